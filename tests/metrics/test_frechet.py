import feature_sets
import numpy as np
import pytest

from diffusionlab.evals import statistics_file
from diffusionlab.metrics import class_frechet, extrapolation, frechet, moments
from diffusionlab.metrics.moments import Moments

FD = 9.1032718686  # of the golden sets, to the digits it was published with


def gaussian(mean, variance, num=11):
    mean, variance = np.asarray(mean, float), np.asarray(variance, float)
    return Moments(num, mean, np.diag(variance) * (num - 1))


def distance(a, b):
    return frechet.frechet_distance(moments.of_rows(a), moments.of_rows(b))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_golden_value():
    a, b, _ = feature_sets.golden()
    assert distance(a, b) == pytest.approx(FD, abs=1e-9)
    assert distance(b, a) == pytest.approx(FD, abs=1e-9), "it is symmetric"


def test_diagonal_gaussians_by_hand():
    a = gaussian([0, 0, 0], [1, 4, 9])
    assert frechet.frechet_distance(a, gaussian([1, 1, 1], [4, 1, 1])) == pytest.approx(
        9, abs=1e-12
    )


def test_shift_scale_and_rotation_have_known_answers():
    x = normal(200, 16) + 0.5
    mean, covariance = x.mean(0), np.cov(x, rowvar=False)
    assert distance(x, x) < 1e-8
    assert distance(x, x + 0.7) == pytest.approx(16 * 0.7**2, abs=1e-8)
    scaled = 0.25 * (mean @ mean + np.trace(covariance))
    assert distance(x, 1.5 * x) == pytest.approx(scaled, abs=1e-8)
    turn, y = np.linalg.qr(normal(16, 16, seed=1))[0], normal(150, 16, seed=2)
    assert distance(x @ turn, y @ turn) == pytest.approx(distance(x, y), abs=1e-8)


@pytest.mark.parametrize("num, num_other", [(10, 12), (10, 200), (200, 10)])
def test_singular_covariances_agree_with_the_eigenvalues_of_the_product(num, num_other):
    x, y = normal(num, 24), 1.3 * normal(num_other, 24, seed=1) + 0.2
    products = np.linalg.eigvals(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    exact = np.sum((x.mean(0) - y.mean(0)) ** 2) + x.var(0, ddof=1).sum()
    exact += y.var(0, ddof=1).sum()
    exact -= 2 * np.sum(np.sqrt(products.astype(complex)).real)
    # A zero eigenvalue is eps times the largest, about 10, and its root 1e-7 or so.
    assert distance(x, y) == pytest.approx(exact, abs=24 * 2e-7)
    assert frechet.distance_of_rows(x, y) == pytest.approx(exact, abs=24 * 2e-7)
    assert distance(x, x) < 1e-5
    assert frechet.distance_of_rows(x, x) < 1e-5


def test_distances_of_rows_are_those_of_moments():
    a, b, _ = feature_sets.golden()
    assert frechet.distance_of_rows(a, b) == pytest.approx(FD, abs=1e-9)
    few = frechet.distance_of_rows(a[:20], b)
    # As above, for the 13 eigenvalues that are 0.
    assert few == pytest.approx(distance(a[:20], b), abs=13 * 2e-7)


def test_bias_is_that_of_equation_3():
    d, num, repeats = 16, 1000, 24
    exact = gaussian(np.zeros(d), np.ones(d))
    found = [
        frechet.frechet_distance(moments.of_rows(normal(num, d, seed=seed)), exact)
        for seed in range(repeats)
    ]
    expected = (d + d * (d + 1) / 4) / num
    # Terms of order N^-3/2 and beyond are a few per cent here.
    error = 3 * np.std(found) / repeats**0.5 + 0.03 * expected
    assert np.mean(found) == pytest.approx(expected, abs=error)


def test_interval_of_the_jackknife_covers_the_expectation():
    other = feature_sets.reference(normal(400, 4, seed=99))

    def draw(rng):
        x = 1.2 * rng.normal(size=(200, 4)) + 0.3
        return frechet.Frechet()(feature_sets.Arrays(features=x), other)

    numbers = [draw(np.random.default_rng(s)).numbers["frechet"] for s in range(100)]
    share = feature_sets.covered(
        lambda rng: draw(rng).intervals["frechet"], np.mean(numbers), 100
    )
    # 0.95 ± 3 standard deviations of a share of 100, and a little for skewness.
    assert 0.86 <= share <= 1.0
    widths = np.ptp([draw(np.random.default_rng(0)).intervals["frechet"]])
    assert widths == pytest.approx(2 * 2.262 * np.std(numbers), rel=0.6)


def test_metric_has_number_interval_and_notes():
    a, b, _ = feature_sets.golden()
    sets = (
        feature_sets.Arrays(features=b, spatial=b),
        feature_sets.reference(a, spatial=a),
    )
    for metric, name in (
        (frechet.Frechet(), "frechet"),
        (frechet.SpatialFrechet(), "spatial_frechet"),
    ):
        result = metric(*sets)
        assert result.numbers == {name: pytest.approx(FD, abs=1e-9)}
        low, high = result.intervals[name]
        assert low < FD < high
        assert "warning" not in result.notes
        assert "250 samples against 300" in result.notes[name]
    assert frechet.Frechet(groups=0)(*sets).intervals == {}


def test_moments_alone_have_a_distance_and_no_interval():
    a, b, _ = feature_sets.golden()
    samples = feature_sets.Arrays(features=b, only_moments=True)
    result = frechet.Frechet()(samples, feature_sets.reference(a, only_moments=True))
    assert result.numbers["frechet"] == pytest.approx(FD, abs=1e-9)
    assert not result.intervals and "moments" in result.notes["interval"]


@pytest.mark.filterwarnings("error")
def test_statistics_of_an_unknown_number_of_examples_have_a_distance():
    a, b, _ = feature_sets.golden()
    known = statistics_file.Known(np.inf, a.mean(0), np.cov(a, rowvar=False))
    other = statistics_file.StatisticsFile("file", 0, {"features": known}, {}, "")
    samples = feature_sets.Arrays(features=b)
    found = frechet.Frechet()(samples, other)
    assert found.numbers["frechet"] == pytest.approx(FD, abs=1e-9)
    assert "250 samples against an unknown number of" in found.notes["frechet"]
    assert "warning" not in found.notes and "frechet" in found.intervals
    back = frechet.Frechet()(other, feature_sets.reference(b))
    assert back.numbers["frechet"] == pytest.approx(FD, abs=1e-9)
    assert "an unknown number of samples against 250" in back.notes["frechet"]
    infinity = extrapolation.FrechetInfinity(points=3, smallest=125)
    same = infinity(samples, feature_sets.reference(a))
    assert infinity(samples, other).numbers == pytest.approx(same.numbers)


def test_fewer_samples_than_features_are_warned_about():
    a, b, _ = feature_sets.golden()
    few = feature_sets.Arrays(features=b[:30])
    notes = frechet.Frechet()(few, feature_sets.reference(a)).notes
    assert "30 examples of 32 features" in notes["warning"]
    assert "kernel" in notes["warning"], "it says what to do"


def test_bad_features_are_named():
    a, b, _ = feature_sets.golden()
    other = feature_sets.reference(a)
    bad = b.copy()
    bad[[3, 7], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="samples: 2 of 250 rows of 'features'"):
        frechet.Frechet()(feature_sets.Arrays(features=bad), other)
    only = feature_sets.Arrays(features=bad, only_moments=True)
    with pytest.raises(ValueError, match="samples: only moments are known"):
        frechet.Frechet()(only, other)
    with pytest.raises(ValueError, match="samples, the reference: .* 31 and 32"):
        frechet.Frechet()(feature_sets.Arrays(features=b[:, 1:]), other)
    with pytest.raises(ValueError, match="samples: .* at least 2 examples, got 1"):
        frechet.Frechet()(feature_sets.Arrays(features=b[:1]), other)
    with pytest.raises(ValueError, match="groups: must be 0"):
        frechet.Frechet(groups=1)
    with pytest.raises(ValueError, match="32 and 31 features"):
        distance(a, b[:, 1:])


def classes(features, label, name="samples"):
    names = ("apple", "pear", "plum")
    return feature_sets.Arrays(name, features, label=label, class_names=names)


def test_classes_have_a_distance_each_that_the_whole_does_not_see():
    centre = np.repeat(np.eye(3) * 10, 40, axis=0)
    label = np.repeat(np.arange(3), 40)
    real, fake = (normal(120, 3, seed=s) + centre for s in (0, 1))
    other = classes(real, label, "the reference")
    right = class_frechet.ClassFrechet()(classes(fake, label), other)
    assert set(right.numbers) == {
        "class_frechet",
        *(f"class_frechet/{name}" for name in ("apple", "pear", "plum")),
    }
    each = [value for name, value in right.numbers.items() if "/" in name]
    assert right.numbers["class_frechet"] == pytest.approx(np.mean(each))
    assert right.numbers["class_frechet/pear"] == pytest.approx(
        distance(fake[40:80], real[40:80])
    )
    low, high = right.intervals["class_frechet"]
    assert low < right.numbers["class_frechet"] < high
    confused = label.copy()
    confused[:80] = 1 - label[:80]
    wrong = class_frechet.ClassFrechet(groups=0)(classes(fake, confused), other)
    # Apple and pear are 10 apart in two directions.
    assert wrong.numbers["class_frechet/apple"] == pytest.approx(200, rel=0.1)
    assert wrong.numbers["class_frechet/plum"] == right.numbers["class_frechet/plum"]
    assert not wrong.intervals


def test_classes_without_labels_or_examples_are_named():
    x, label = normal(9, 3), np.repeat(np.arange(3), 3)
    other, metric = classes(x, label, "the reference"), class_frechet.ClassFrechet()
    few = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2])
    with pytest.raises(ValueError, match="samples: class 'pear' has 1 examples"):
        metric(classes(x, few), other)
    with pytest.raises(ValueError, match="samples: class 'plum' has 0 examples"):
        metric(classes(x, label % 2), other)
    with pytest.raises(ValueError, match="samples: 'class_frechet' needs a label"):
        metric(classes(x, None), other)
    assert not metric(classes(x, label), other).intervals, "3 are too few for groups"
