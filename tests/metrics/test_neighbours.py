import dataclasses

import feature_sets
import numpy as np
import pytest

from diffusionlab.metrics import distances
from diffusionlab.metrics import neighbours as nb

INTEGERS = np.array([[0.0], [1.0], [2.0], [3.0]])


def test_knn_radii_by_hand():
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert nb.knn_radii(x, 1).tolist() == [1, 1, 2, 4]
    assert nb.knn_radii(x, 2).tolist() == [3, 2, 3, 6]


def test_radii_of_repeated_points_are_zero():
    assert nb.knn_radii(np.full((3, 2), 0.1), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_have_that_many_neighbours(k):
    with pytest.raises(ValueError, match="k: expected 1 to 3 for 4 points, got"):
        nb.knn_radii(np.zeros((4, 1)), k)


def test_precision_and_recall_by_hand():
    # Balls, k = 1: real 0.1±0.9, 1±0.9, 3±2, 7±4; fake 0.5±0.5, 1±0.5, 20±19.
    real = np.array([[0.1], [1.0], [3.0], [7.0]])
    fake = np.array([[0.5], [1.0], [20.0]])
    precision, recall = nb.precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3), "20 lies in no ball of the real points"
    assert recall == 1, "the ball of the outlier at 20 reaches down to 3"
    precision, recall = nb.precision_recall(real, fake[:2], k=1)
    assert (precision, recall) == (1, 0.5)


def test_all_four_by_hand():
    found = nb.prdc(INTEGERS, np.array([[0.1], [10.0]]), k=1)
    assert found == (0.5, 1.0, 1.0, 0.5)


def test_the_edge_of_a_ball_is_in_it_unless_strict():
    fake = np.array([[4.0], [8.0]])  # 4 is 1 from 3, and 0 is 4 from 4
    assert nb.prdc(INTEGERS, fake, 1, strict=False) == (0.5, 1.0, 0.5, 0.25)
    assert nb.prdc(INTEGERS, fake, 1, strict=True) == (0.0, 0.75, 0.0, 0.0)


def test_golden_values():
    a, b, _ = feature_sets.golden()
    assert nb.prdc(a, b, 5) == pytest.approx((0.492, 239 / 300, 0.3752, 202 / 300))
    assert nb.prdc(a, b, 3, strict=False)[:2] == pytest.approx((0.392, 0.62))


def test_equal_distributions_have_the_expected_values():
    x, y = np.random.default_rng(3).normal(size=(2, 2000, 2))
    precision, recall, density, coverage = nb.prdc(x, y, 5)
    assert precision > 0.99 and recall > 0.99
    assert density == pytest.approx(1, abs=0.03)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.01)


def by_definition(real, fake, k, strict):
    """Spec: all differences in float64, no expansion and no blocks."""
    less = np.less if strict else np.less_equal

    def apart(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.sum((a[:, None] - b[None]) ** 2, axis=-1)

    def radii(x):
        d = apart(x, x)
        np.fill_diagonal(d, np.inf)
        return np.sort(d, axis=1)[:, k - 1]

    d, of_real, of_fake = apart(real, fake), radii(real), radii(fake)
    held = less(d, of_real[:, None])
    return (
        held.any(0).mean(),
        less(d, of_fake).any(1).mean(),
        held.sum(0).mean() / k,
        held.any(1).mean(),
    )


def awkward(name):
    """Sets on which float32, or the expanded square, would decide otherwise."""
    rng = np.random.default_rng(4)
    if name == "far":  # of a mean 1e4 times the spread, in two clusters
        x = rng.normal(size=(90, 20)) + 1e4 * (np.arange(90) % 2)[:, None]
        return x[:50], x[50:]
    if name == "grid":  # with most distances shared by many
        x = rng.integers(0, 3, size=(150, 3)).astype(np.float32)
        return x[:80], x[80:]
    if name == "copies":
        x = rng.normal(size=(60, 64)).astype(np.float32)
        return x, np.concatenate([x[:20], x[:20], x[30:40]])
    if name == "clusters":  # of which each needs all of its pairs once more
        x = rng.normal(size=(160, 8)) + 3e3 * (np.arange(160) % 2)[:, None]
        return x[:80], x[80:]
    if name == "collapsed":  # half of both sets is one row, and far from the rest
        x = rng.normal(size=(120, 8)) + 1e3
        x[::2] = 0.1
        return x[:60], x[60:]
    if name == "outlier":  # 1e6 away, in one set
        x = rng.normal(size=(100, 8))
        x[7] += 1e6
        return x[:50], x[50:]
    x = 1e-4 * rng.normal(size=(80, 2)) + 1  # "narrow"
    return x[:40], x[40:]


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "name",
    ["far", "grid", "copies", "clusters", "collapsed", "outlier", "narrow"],
)
def test_awkward_sets_are_decided_exactly(name, strict, products, monkeypatch):
    monkeypatch.setattr(distances, "_MANY", 1 if products else 10**9)
    monkeypatch.setattr(distances, "_DENSE", 10**9)
    monkeypatch.setattr(distances, "_PIECE", 100)
    real, fake = awkward(name)
    expected = by_definition(real, fake, 3, strict)
    assert nb.prdc(real, fake, 3, strict) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["clusters", "collapsed"])
def test_many_pairs_that_float32_leaves_are_not_summed_one_by_one(name, monkeypatch):
    real, fake = awkward(name)
    summed, left, exact = [], [], distances.exact
    near = distances.near

    def count(a, b, i, j):
        summed.append(int(np.sum(a.hashes[i] != b.hashes[j])))
        return exact(a, b, i, j)

    def undecided(a, b, i, j, limit):
        left.append(len(i))
        return near(a, b, i, j, limit)

    monkeypatch.setattr(distances, "_MANY", 100)
    monkeypatch.setattr(distances, "exact", count)
    monkeypatch.setattr(distances, "near", undecided)
    nb.inside(real, fake, 3)
    assert sum(left) > 20 * (len(real) + len(fake)), "it is the case it claims to be"
    # The k-th of each point itself, and few besides.
    assert sum(summed) < 4 * (len(real) + len(fake))


def test_hashes_are_of_copies_alone():
    x = np.array([[1, 2], [1, 2], [2, 1], [1, 2.0000002]], np.float32)
    a, b = (distances.points(x.astype(kind), np.zeros(2)) for kind in ("f4", "f8"))
    assert (a.hashes == a.hashes[0]).tolist() == [True, True, False, False]
    every = np.arange(4)
    zeros = distances.exact(a, b, every, every)
    assert zeros.tolist() == [0] * 4, "of two types they are summed"
    alike = dataclasses.replace(a, hashes=np.zeros(4, np.int64))
    assert distances.exact(alike, alike, every, every[::-1]).max() == 0, "no sum"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_are_those_of_the_package_prdc(dtype, capsys):
    prdc = pytest.importorskip("prdc")
    rng = np.random.default_rng(5)
    for shift, scale in ((0.0, 1.0), (0.05, 1.1), (0.0, 0.8)):
        real = rng.normal(size=(300, 64)).astype(dtype)
        fake = (scale * rng.normal(size=(250, 64)) + shift).astype(dtype)
        theirs = prdc.compute_prdc(real, fake, 5)
        assert nb.prdc(real, fake, 5)._asdict() == pytest.approx(theirs, abs=1e-12)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(50, 3, 2)), rng.normal(size=(70, 3, 2)) * 1.2
    real, fake = nb.flat(real), nb.flat(fake)

    parts = nb.base.groups_of(70, 4)

    def all_of_it():
        return [*nb.inside(real, fake, 3, groups=parts), *nb.nearest(fake, real)]

    whole = all_of_it()
    monkeypatch.setattr(distances, "_ENTRIES", 170)
    monkeypatch.setattr(distances, "_PIECE", 60)
    for one, other in zip(whole, all_of_it(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_group_is_what_the_others_give():
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(60, 3)), 1.3 * rng.normal(size=(43, 3))
    parts = nb.base.groups_of(43, 4)
    found = nb.inside(real, fake, 2, groups=parts)
    for g, part in enumerate(parts):
        rest = nb.inside(real, np.delete(fake, part, axis=0), 2)
        assert np.array_equal(found.covered_without[g], rest.covered)
        assert np.array_equal(found.recalled_without[g], rest.recalled)


def test_a_copied_mode_is_precise_and_recalls_little():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2)) + np.repeat([[0, 0], [30, 0]], 100, axis=0)
    precision, recall = nb.precision_recall(real, real[:100] + 0.01)
    assert precision > 0.95
    assert 0.4 < recall < 0.52


def test_a_copy_is_at_distance_exactly_zero():
    x = np.random.default_rng(2).normal(100, 1, size=(40, 64)).astype(np.float32)
    index, distance = nb.nearest(x[::-1], x)
    assert index.tolist() == list(range(40))[::-1]
    assert distance.max() == 0


def metrics(fake, real, **options):
    sets = feature_sets.Arrays(features=fake), feature_sets.reference(real)
    results = [m(**options)(*sets) for m in (nb.PrecisionRecall, nb.DensityCoverage)]
    return (
        results[0].numbers | results[1].numbers,
        results[0].intervals | results[1].intervals,
        results[0].notes | results[1].notes,
    )


def test_metrics_have_the_numbers_of_their_conventions():
    a, b, _ = feature_sets.golden()
    numbers, intervals, notes = metrics(b, a)
    assert numbers == pytest.approx(
        {"precision": 0.392, "recall": 0.62, "density": 0.3752, "coverage": 202 / 300}
    )
    assert all(low < numbers[n] < high for n, (low, high) in intervals.items())
    assert set(intervals) == set(numbers)
    assert "k = 3, distance <= radius" in notes["precision"]
    assert "k = 5, distance < radius" in notes["density"]
    assert metrics(b, a, groups=0)[1] == {}
    assert metrics(b, a, groups=0)[0] == numbers


def test_shares_at_either_end_have_intervals_with_a_width():
    rng = np.random.default_rng(8)
    real, fake = 0.5 * rng.normal(size=(40, 2)), rng.normal(size=(400, 2))
    numbers, intervals, _ = metrics(fake, real, k=5)
    assert numbers["coverage"] == numbers["recall"] == 1
    # Wilson's interval of 40 of 40.
    assert intervals["coverage"] == pytest.approx((40 / (40 + 1.96**2), 1))
    assert intervals["recall"] == intervals["coverage"]
    numbers, intervals, _ = metrics(fake[:30] + 50, real, k=5)
    assert numbers["coverage"] == numbers["recall"] == 0
    # Of 0 of 30, as there are fewer samples than examples.
    assert intervals["recall"] == pytest.approx((0, 1.96**2 / (30 + 1.96**2)))


def test_shares_in_the_middle_have_the_interval_of_the_jackknife():
    rng = np.random.default_rng(9)
    real, fake = rng.normal(size=(90, 2)), 0.5 * rng.normal(size=(2000, 2))
    parts = nb.base.groups_of(2000, 10)
    found = nb.inside(real, fake, 3, groups=parts)
    without = found.recalled_without.mean(axis=1)
    exact = nb.base.jackknife(found.recalled.mean(), without)
    wide = nb.base.of_share(found.recalled.sum(), 90)[1]
    assert wide[0] < exact[0] < exact[1] < wide[1], "Wilson's would be too wide"
    assert metrics(fake, real, k=3)[1]["recall"] == pytest.approx(exact)


def test_intervals_cover():
    rng = np.random.default_rng(7)
    real = rng.normal(size=(250, 3))
    found = [metrics(1.2 * rng.normal(size=(150, 3)) + 0.4, real) for _ in range(60)]
    for name in ("precision", "recall", "density", "coverage"):
        numbers = [each[0][name] for each in found]
        ends = np.array([each[1][name] for each in found])
        inside = (ends[:, 0] <= np.mean(numbers)) & (np.mean(numbers) <= ends[:, 1])
        # 0.95 less 3 standard deviations of a share of 60.
        assert inside.mean() >= 0.865, name
        assert np.diff(ends).mean() < 8 * np.std(numbers), name


def test_what_cannot_be_is_said():
    a, b, _ = feature_sets.golden()
    with pytest.raises(ValueError, match="k: expected 1 to 2 for 3 points of samples"):
        metrics(b[:3], a)
    with pytest.raises(ValueError, match="4 points of the reference, got 5"):
        metrics(b, a[:4], k=5)
    with pytest.raises(ValueError, match="k: must be above 0"):
        nb.PrecisionRecall(k=0)
    with pytest.raises(ValueError, match="only moments"):
        nb.PrecisionRecall()(
            feature_sets.Arrays(features=b),
            feature_sets.reference(a, only_moments=True),
        )
    assert "recall" not in metrics(b[:5], a)[1], "without a group too few are left"
