import dataclasses

import numpy as np
import pytest

from diffusionlab import evaluate, types
from diffusionlab.evals import sample_variance

MEANS = np.array([[3.0, 0.0], [-3.0, 1.0]])
SCALES = np.array([0.5, 0.1])  # along the axes, about each mean


@dataclasses.dataclass
class Arrays:
    """A source of given examples."""

    x: np.ndarray
    label: np.ndarray
    spec: types.DataSpec

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": self.label[index]}


def vectors(number, seed, scales=(1.0, 1.0)):
    """Two classes, whose spread is `scales` times the right one along the axes."""
    label = np.arange(number) % 2
    noise = np.random.default_rng(seed).normal(size=(number, 2))
    return MEANS[label] + SCALES * np.asarray(scales) * noise, label


def context(draw, make, spec):
    sources = [Arrays(*make(4000, seed), spec) for seed in (0, 1)]
    nothing = dict.fromkeys(("loss", "predict", "compute", "process", "sampler"))
    return types.EvalContext(
        step=1, spec=spec, train=sources[0], test=sources[1], draw=draw, **nothing
    )


def evaluated(scales, num_classes=2, names=(), **options):
    spec = types.DataSpec((2,), num_classes, names)
    evaluator = sample_variance.SampleVariance(num_samples=4000, **options)
    return evaluator(context(lambda n: vectors(n, 2, scales), vectors, spec))


def test_variance_is_compared_within_classes_and_along_principal_directions():
    result = evaluated((0.5, 2.0))
    numbers = result.numbers
    # 2000 samples a class: a variance is within 4 % (two standard deviations), the
    # ratio of two within 6 %, which is averaged over the classes.
    assert numbers["variance_by_direction/from_1"] == pytest.approx(0.25, rel=0.06)
    assert numbers["variance_by_direction/from_2"] == pytest.approx(4.0, rel=0.06)
    whole = (0.25 * 0.25 + 4 * 0.01) / 0.26
    assert numbers["variance_ratio"] == pytest.approx(whole, rel=0.06)
    for c in "01":
        assert numbers[f"variance_ratio/{c}"] == pytest.approx(whole, rel=0.09)
    assert numbers["variance_ratio_real"] == pytest.approx(1, rel=0.06)
    assert "2 of them" in result.notes["variance"]
    assert result.pictures["spectrum"].dtype == np.uint8


def test_without_classes_it_is_about_the_mean_of_all():
    result = evaluated((0.0, 0.0), num_classes=0)
    # What is left lies at the two means: the variance between them.
    between = np.sum((MEANS[0] - MEANS[1]) ** 2) / 4
    assert result.numbers["variance_ratio"] == pytest.approx(
        between / (between + 0.26), rel=0.01
    )
    assert "variance_ratio/0" not in result.numbers
    assert "warning" not in result.notes


def test_a_collapse_is_a_warning_that_the_terminal_shows():
    assert "warning" not in evaluated((0.8, 0.8)).notes
    said = evaluate.warnings_of(evaluated((0.6, 0.6)))
    assert said.startswith("\n  warning: collapse: the samples vary 0.3")
    assert "threshold 0.5" in said
    assert not evaluate.warnings_of(evaluated((0.6, 0.6), threshold=0.3))
    assert "samples vary nan" in evaluated((np.nan, 1.0)).notes["warning"]


def test_one_class_that_collapses_is_named():
    spec = types.DataSpec((2,), 2, ("cats", "dogs"))

    def draw(number):
        x, label = vectors(number, 2)
        return np.where(label[:, None] == 1, MEANS[1] + 0.5 * (x - MEANS[1]), x), label

    def run(number):
        evaluator = sample_variance.SampleVariance(num_samples=number)
        return evaluator(context(draw, vectors, spec))

    result = run(4000)
    assert result.numbers["variance_ratio"] == pytest.approx(0.625, rel=0.1)
    assert result.numbers["variance_ratio/dogs"] == pytest.approx(0.25, rel=0.1)
    assert "collapse of 1 of 2 classes" in result.notes["warning"]
    assert "dogs: 0.2" in result.notes["warning"]
    assert "warning" not in run(100).notes, "50 samples of a class are too few"


def test_of_many_classes_with_a_sample_each_all_are_taken_together():
    spec = types.DataSpec((2,), 2000)
    evaluator = sample_variance.SampleVariance(num_samples=100)

    def draw(number):
        return vectors(number, 2)[0], np.arange(number)

    result = evaluator(context(draw, vectors, spec))
    assert "not compared" in result.notes["variance"]
    assert np.isfinite(list(result.numbers.values())).all()


def images(number, seed, filtered=None):
    """White noise 4 x 6 with 3 channels; of `filtered`, one DCT coefficient is left."""
    from scipy import fft

    noise = np.random.default_rng(seed).normal(size=(number, 4, 6, 3))
    if filtered is not None:
        kept = np.zeros((4, 6, 1))
        kept[filtered] = 1
        both = dict(axes=(1, 2), norm="ortho")
        noise = fft.idctn(fft.dctn(noise, **both) * kept, **both)
    return noise, np.zeros(number, int)


def test_images_are_compared_by_rings_of_the_transform():
    spec = types.DataSpec((4, 6, 3))
    evaluator = sample_variance.SampleVariance(num_samples=500, num_bins=4)

    def run(filtered):
        draw = lambda n: images(n, 2, filtered)  # noqa: E731
        return evaluator(context(draw, images, spec)).numbers

    white = run(None)
    rings = {n: v for n, v in white.items() if n.startswith("variance_by_frequency/")}
    assert [n.split("/")[1] for n in rings] == ["0.125", "0.375", "0.625", "0.875"]
    # The smallest ring has 9 numbers an image: 2 sqrt(2 / 4500), two deviations.
    assert list(rings.values()) == pytest.approx([1] * len(rings), rel=0.06)
    assert white["variance_ratio"] == pytest.approx(1, rel=0.03)
    ring = sample_variance.rings(4, 6, 4).reshape(4, 6)
    at = 1, 2  # sqrt((1/16 + 1/9) / 2) = 0.295: ring 1
    assert ring[at] == 1 and ring[0, 0] == 0 and ring[3, 5] == 3
    one = run(at)
    share = 1 / np.sum(ring == 1)
    assert one["variance_by_frequency/0.375"] == pytest.approx(share, rel=0.1)
    assert one["variance_by_frequency/0.125"] == pytest.approx(0, abs=1e-12)
    assert one["variance_by_frequency/0.875"] == pytest.approx(0, abs=1e-12)


def test_the_edge_of_a_ring_belongs_to_the_next():
    ring = sample_variance.rings(8, 8, 8).reshape(8, 8)
    assert np.diag(ring).tolist() == list(range(8)), (
        "sqrt((i/8)² + (i/8)²)/sqrt 2 = i/8"
    )
    assert ring.max() == 7


def test_the_variance_of_several_classes_is_their_average():
    x = np.array([[0.0], [2.0], [10.0], [16.0]])
    found = sample_variance.within(x, np.array([0, 0, 1, 1]), np.array([0, 1]))
    assert [found.total(0), found.total(1), found.total()] == [2.0, 18.0, 10.0]


def test_videos_sum_over_their_frames():
    x = np.random.default_rng(0).normal(size=(50, 2, 4, 6, 3))
    whole = sample_variance.within(x, np.zeros(50, int), None)
    frames = [
        sample_variance.within(x[:, f], np.zeros(50, int), None).by_class[0]
        for f in range(2)
    ]
    assert whole.by_class[0] == pytest.approx(sum(frames))
    assert whole.total() == pytest.approx(np.var(x, axis=0, ddof=1).sum())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_samples": 1}, "num_samples: must be at least 2, got 1"),
        ({"num_bins": 0}, "num_bins: must be at least 1"),
        ({"threshold": 1.0}, r"threshold: must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        sample_variance.SampleVariance(**options)
    spec = types.DataSpec((16, 8))
    with pytest.raises(ValueError, match="vectors"):
        sample_variance.SampleVariance().check(Arrays(None, None, spec))
