import feature_sets
import numpy as np
import pytest

from diffusionlab.metrics import kernel

E1, E2 = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])


def test_two_points_by_hand():
    x = np.array([[0.0], [1.0]])
    # k(0, 1) = 1, and k over all pairs is 1, 1, 1, 8: 2 (1 + 1) / 2 - 2 11 / 4.
    assert kernel.kernel_distance(x, x) == pytest.approx(-3.5, abs=1e-12)
    with pytest.raises(ValueError, match="got 2 and 1"):
        kernel.kernel_distance(x, x[:1])


def test_golden_value():
    a, b, _ = feature_sets.golden()
    values = kernel.kernel_subsets(a, b, 20, 100, 2020).values
    assert values.mean() == pytest.approx(0.2303308020, abs=1e-9)
    assert values.std() == pytest.approx(0.0423026423, abs=1e-9)


def test_metric_has_the_samples_first():
    a, b, _ = feature_sets.golden()
    metric = kernel.Kernel(subsets=20, subset_size=100)
    result = metric(feature_sets.Arrays(features=a), feature_sets.reference(b))
    assert result.numbers["kernel"] == pytest.approx(0.2303308020, abs=1e-9)
    assert result.numbers["kernel_std"] == pytest.approx(0.0423026423, abs=1e-9)
    low, high = result.intervals["kernel"]
    assert low < result.numbers["kernel"] < high
    assert "20 subsets of 100 from 300 samples and 250" in result.notes["kernel"]
    assert "draw of the 250 examples" in result.notes["warning"]
    many = feature_sets.reference(np.tile(b, (4, 1)))
    notes = metric(feature_sets.Arrays(features=a), many).notes
    assert "warning" not in notes, "1,000 examples are many"
    whole = kernel.Kernel(subsets=1, subset_size=1000)
    notes = whole(feature_sets.Arrays(features=np.tile(a, (4, 1))), many).notes
    assert "draw of the 1000 examples" in notes["warning"]
    assert "subsets of" not in notes["warning"]


def test_one_subset_that_is_all_of_both_sets_has_no_spread():
    a, b, _ = feature_sets.golden()
    sets = feature_sets.Arrays(features=a[:200]), feature_sets.reference(b[:200])
    found = kernel.Kernel()(*sets)
    exact = kernel.kernel_distance(a[:200], b[:200])
    assert found.numbers == {"kernel": pytest.approx(exact, rel=1e-12)}
    assert "whole of both" in found.notes["kernel_std"]
    assert "1 subset of 200" in found.notes["kernel"]
    fewer = kernel.Kernel(subsets=5)(
        feature_sets.Arrays(features=a[:201]), feature_sets.reference(b[:200])
    )
    assert fewer.numbers["kernel_std"] > 1e-6


def test_a_small_reference_moves_the_interval_and_is_warned_about():
    rng = np.random.default_rng(4)
    sets = [rng.normal(size=(num, 4)) for num in (400, 30, 400)]
    small = feature_sets.reference(sets[1])
    one, two = (
        kernel.Kernel(subsets=20)(feature_sets.Arrays(features=x), small)
        for x in (sets[0], sets[2])
    )
    for found in (one, two):
        warning = found.notes["warning"]
        assert "subsets of 30" in warning and "draw of the 30 examples" in warning
        assert warning.count(".") == 1, "one sentence"


def test_small_sets_have_small_subsets_and_a_warning():
    a, b, _ = feature_sets.golden()
    metric = kernel.Kernel(subsets=3)
    sets = feature_sets.Arrays(features=a[:50]), feature_sets.reference(b[:60])
    assert "subsets of 50" in metric(*sets).notes["warning"]
    with pytest.raises(ValueError, match="at least 2 examples of each, got 1 and 60"):
        metric(feature_sets.Arrays(features=a[:1]), sets[1])
    with pytest.raises(ValueError, match="subset_size: must be at least 2"):
        kernel.Kernel(subset_size=1)
    with pytest.raises(ValueError, match="subsets: must be above 0"):
        kernel.Kernel(subsets=0)


def test_expectation_does_not_depend_on_the_number_of_samples():
    rng = np.random.default_rng(0)
    for num in (5, 40):
        found = [
            kernel.kernel_distance(*rng.normal(size=(2, num, 3))) for _ in range(400)
        ]
        assert abs(np.mean(found)) < 3 * np.std(found) / 20


@pytest.mark.parametrize(
    "metric, name",
    [
        (kernel.Kernel(subsets=20, subset_size=80), "kernel"),
        (kernel.Kernel(subsets=10), "kernel"),
        (kernel.Cmmd(), "cmmd"),
    ],
)
def test_intervals_cover(metric, name):
    rng = np.random.default_rng(1)
    other = feature_sets.reference(rng.normal(size=(300, 4)))
    results = []
    for _ in range(60):
        x = 1.2 * rng.normal(size=(200, 4)) + 0.3
        results.append(metric(feature_sets.Arrays(features=x), other))
    numbers = [result.numbers[name] for result in results]
    ends = np.array([result.intervals[name] for result in results])
    inside = (ends[:, 0] <= np.mean(numbers)) & (np.mean(numbers) <= ends[:, 1])
    # 0.95 less 3 standard deviations of a share of 60.
    assert inside.mean() >= 0.865
    # Twice 1.96 to 2.26 standard deviations, which 60 numbers say to 10 %.
    assert np.diff(ends).mean() == pytest.approx(4.2 * np.std(numbers), rel=0.35)


def test_cmmd_by_hand():
    exact = 2000 * (1 - np.exp(-0.01))
    assert kernel.cmmd(E1, E2) == pytest.approx(exact, abs=1e-9)
    assert exact == pytest.approx(19.9003325, abs=1e-7)
    assert kernel.cmmd(E1, -E1) == pytest.approx(39.6026534, abs=1e-7)
    assert kernel.cmmd(E1, 7 * E1) == pytest.approx(0, abs=1e-12), "length 1"


def test_cmmd_of_one_set_is_zero_in_any_blocks(monkeypatch):
    a, b, _ = feature_sets.golden()
    assert kernel.cmmd(a, a) == pytest.approx(0, abs=1e-9)
    whole = kernel.cmmd(a, b)
    monkeypatch.setattr(kernel, "_BLOCK", 37)
    assert kernel.cmmd(a, b) == pytest.approx(whole, abs=1e-9)


def test_cmmd_without_a_group_is_that_of_the_rest():
    a, b, _ = feature_sets.golden()
    parts = kernel.base.groups_of(300, 4)
    sums = kernel.kernel_sums(a, b, groups=parts)
    kept = np.array([True, True, False, True])
    rest = np.delete(a, parts[2], axis=0)
    expected = kernel.cmmd(rest, b)
    assert 1000 * sums.distance(kept) == pytest.approx(expected, abs=1e-9)
    result = kernel.Cmmd(groups=4)(
        feature_sets.Arrays(features=a), feature_sets.reference(b)
    )
    assert result.numbers["cmmd"] == pytest.approx(kernel.cmmd(a, b), abs=1e-9)
    low, high = result.intervals["cmmd"]
    assert low < result.numbers["cmmd"] < high
    with pytest.raises(ValueError, match="bandwidth: must be above 0"):
        kernel.Cmmd(bandwidth=0.0)
