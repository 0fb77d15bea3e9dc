import feature_sets
import numpy as np
import pytest
from scipy import stats

from diffusionlab.metrics import sliced_wasserstein as sliced
from diffusionlab.metrics.sliced_wasserstein import SlicedWasserstein


def distance(x, y, **options):
    return sliced.sliced_wasserstein(x, y, **options)[0]


def test_one_dimension_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for num, num_other in ((20, 20), (20, 35), (7, 3), (1, 5)):
        x, y = rng.normal(size=(num, 1)), 2 * rng.normal(size=(num_other, 1))
        exact = stats.wasserstein_distance(x[:, 0], y[:, 0])
        assert distance(x, y, num_directions=3, power=1) == pytest.approx(exact)


def test_pieces_of_different_sizes():
    mine, theirs, weight = sliced.steps(2, 3)
    assert mine.tolist() == [0, 0, 1, 1]
    assert theirs.tolist() == [0, 1, 1, 2]
    assert weight == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3])


def test_squares_of_different_sizes_by_hand():
    a, b = np.array([[0.0], [6.0]]), np.array([[0.0], [3.0], [6.0]])
    # Quantiles differ by 0, 3, 3, 0 over 1/3, 1/6, 1/6, 1/3.
    assert sliced.wasserstein(a, b) == pytest.approx([3])


def test_every_row_twice_changes_nothing():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 30, 4))
    twice = np.concatenate([x, x])
    assert distance(twice, y) == pytest.approx(distance(x, y), rel=1e-12)
    assert distance(x, x) == 0


def test_a_shift_is_its_length_over_the_root_of_the_dimension():
    x, d = np.random.default_rng(2).normal(size=(50, 6)), 6
    shift = np.array([3.0, 0, 4.0, 0, 0, 0])
    # E (theta . shift)² = |shift|² / d; over 4,000 directions to 2 %, 3 deviations 4 %.
    found = distance(x, x + shift, num_directions=4000)
    assert found == pytest.approx(5 / d**0.5, rel=0.04)


def test_directions_are_units_and_of_the_seed():
    found = sliced.directions(5, 40, 3)
    assert found.shape == (5, 40)
    assert np.linalg.norm(found, axis=0) == pytest.approx(np.ones(40))
    assert np.array_equal(found, sliced.directions(5, 40, 3))
    assert not np.array_equal(found, sliced.directions(5, 40, 4))


def test_pieces_of_work_change_nothing(monkeypatch):
    a, b, _ = feature_sets.golden()
    whole = distance(a, b)
    monkeypatch.setattr(sliced, "_ROWS", 77)
    monkeypatch.setattr(sliced, "_DIRECTIONS", 100)
    assert distance(a, b) == pytest.approx(whole, rel=1e-12)


def test_without_a_part_is_what_the_rest_gives():
    a, b, _ = feature_sets.golden()
    parts = [np.arange(0, 200, 2), np.arange(201, 300, 3)]
    found = sliced.sliced_wasserstein(a, b, parts=parts)
    for value, part in zip(found[1:], parts, strict=True):
        rest = np.delete(a, part, axis=0)
        assert value == pytest.approx(distance(rest, b), rel=1e-12)


def test_metric_and_its_options():
    a, b, _ = feature_sets.golden()
    sets = feature_sets.Arrays(features=a), feature_sets.reference(b)
    found = SlicedWasserstein(power=1, num_directions=64)(*sets)
    value = found.numbers["sliced_wasserstein"]
    assert value == pytest.approx(distance(a, b, num_directions=64, power=1))
    low, high = found.intervals["sliced_wasserstein"]
    assert low < value < high
    assert not SlicedWasserstein(groups=0)(*sets).intervals
    with pytest.raises(ValueError, match="power: must be 1 or 2, got 3"):
        SlicedWasserstein(power=3)
    with pytest.raises(ValueError, match="num_directions: must be above 0"):
        SlicedWasserstein(num_directions=0)


def test_intervals_cover():
    rng = np.random.default_rng(3)
    other = feature_sets.reference(rng.normal(size=(200, 3)))
    metric = SlicedWasserstein(num_directions=16)
    found = [
        metric(feature_sets.Arrays(features=1.3 * rng.normal(size=(150, 3)) + 1), other)
        for _ in range(60)
    ]
    numbers = [each.numbers["sliced_wasserstein"] for each in found]
    ends = np.array([each.intervals["sliced_wasserstein"] for each in found])
    inside = (ends[:, 0] <= np.mean(numbers)) & (np.mean(numbers) <= ends[:, 1])
    # 0.95 less 3 standard deviations of a share of 60.
    assert inside.mean() >= 0.865
