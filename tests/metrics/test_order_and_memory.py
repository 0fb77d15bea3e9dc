"""What holds for every metric: any order of the samples, and rows read in pieces."""

import importlib
import inspect
import tracemalloc

import feature_sets
import numpy as np
import pytest
from scipy import stats

from diffusionlab import metrics
from diffusionlab.metrics import base, inception_score, kernel, memorization, moments

GROUPS = 30
OPTIONS = {
    "frechet_infinity": {"points": 4},
    "inception_score_infinity": {"points": 4},
    "inception_score": {"splits": GROUPS},
    "sliced_wasserstein": {"num_directions": 32},
    "kernel": {"subsets": 10},
}


def built(name):
    options = dict(OPTIONS.get(name, {}))
    module, _, kind = metrics.REGISTRY["metric"][name].partition(":")
    make = getattr(importlib.import_module(module), kind)
    if "groups" in inspect.signature(make).parameters:
        options["groups"] = GROUPS
    return make(**options)


def modes(num, seed, spread=1.0):
    """A set sorted by class, and within a class by one of two modes, 10 apart."""
    rng = np.random.default_rng(seed)
    mode = np.arange(num) * 8 // num
    rows = spread * rng.normal(size=(num, 8)) + 10 * np.eye(8)[mode]
    return {
        "features": rows,
        "spatial": rows,
        "logits": rng.normal(size=(num, 8)) + 3 * np.eye(8)[mode],
        "label": mode // 2,
    }


NAMES = sorted(metrics.REGISTRY["metric"])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_sorted_and_shuffled_samples_have_intervals_of_one_width(name, labelled):
    if name == "class_frechet" and not labelled:
        return
    other = feature_sets.reference(**modes(400, 0))
    ordered = modes(480, 1, 1.2)
    if not labelled:
        del ordered["label"]
    order = np.random.default_rng(2).permutation(480)
    shuffled = {key: value[order] for key, value in ordered.items()}
    one, two = (
        built(name)(feature_sets.Arrays(**part), other).intervals
        for part in (ordered, shuffled)
    )
    assert one and set(one) == set(two)
    # Two variances of groups of one distribution, with a probability of 0.001.
    bound = stats.f.ppf(0.9995, GROUPS - 1, GROUPS - 1) ** 0.5
    for number in one:
        ratio = np.ptp(one[number]) / np.ptp(two[number])
        assert 1 / bound < ratio < bound, number


def test_groups_are_a_partition_of_nearly_equal_random_parts():
    parts = base.groups_of(23, 5)
    assert sorted(np.concatenate(parts)) == list(range(23))
    assert np.ptp([len(part) for part in parts]) <= 1
    assert all(np.all(np.diff(part) > 0) for part in parts), "a memory map in order"
    again = base.groups_of(23, 5)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    # Of 1,000 in 10: 99 gaps of about 10 that would all be 1 of contiguous groups.
    assert np.mean(np.diff(base.groups_of(1000, 10)[3])) == pytest.approx(10, rel=0.1)
    assert base.groups_of(7, 1)[0].tolist() == list(range(7))
    assert base.groups_of(7, 0) == []


def test_equal_numbers_of_each_class_are_spread_evenly():
    label = np.random.default_rng(3).permutation(np.arange(202) % 4)
    for part in base.groups_of(202, 10, label):
        counts = np.bincount(label[part], minlength=4)
        assert counts.min() >= 4 and counts.max() <= 6, "5 of each, and the remainder"
    chance, few = np.minimum(label, 2), np.arange(202) // 2
    plain = base.groups_of(202, 10)
    for other in (chance, few):
        found = base.groups_of(202, 10, other)
        assert all(np.array_equal(a, b) for a, b in zip(plain, found, strict=True))


# Those of which the interval is of each sample, of splits, or of each class by itself.
NOT_OF_GROUPS = {"class_frechet", "inception_score", "kernel", "memorization"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_OF_GROUPS])
def test_every_metric_spreads_classes_over_its_groups(name):
    samples, other = modes(240, 1), feature_sets.reference(**modes(200, 0))
    one = built(name)(feature_sets.Arrays(**samples), other)
    samples["label"] = None
    two = built(name)(feature_sets.Arrays(**samples), other)
    assert one.numbers == two.numbers
    assert one.intervals != two.intervals


@pytest.mark.parametrize(
    "name",
    [
        "frechet",
        "frechet_infinity",
        "vendi",
        "cmmd",
        "inception_score",
        "inception_score_infinity",
        "cosine_distances",
    ],
)
def test_rows_never_sit_in_memory_at_once(name, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(2400, 64)).astype(np.float32)
    monkeypatch.setattr(moments, "_ROWS", 100)
    monkeypatch.setattr(kernel, "_BLOCK", 100)
    monkeypatch.setattr(memorization, "_CHUNK", 10_000)

    def measure(rows):
        if name == "cosine_distances":
            return memorization.cosine_distances(rows, rows)
        samples = feature_sets.Arrays(features=rows, logits=rows)
        return built(name)(samples, feature_sets.reference(rows))

    measure(rows[:120])  # imports what it needs
    tracemalloc.start()
    measure(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes


def test_ordered_splits_have_the_jackknife_of_random_groups():
    logits = feature_sets.golden()[2][:200]
    metric = inception_score.InceptionScore(splits=2, seed=None)
    found = metric(feature_sets.Arrays(logits=logits), None)
    rest = []
    for group in base.groups_of(200, 10):
        kept = np.setdiff1d(np.arange(200), group)
        halves = logits[kept[kept < 100]], logits[kept[kept >= 100]]
        rest.append(np.mean([inception_score.split_scores(h, 1, None) for h in halves]))
    value = found.numbers["inception_score"]
    exact = base.jackknife(value, rest)
    assert found.intervals["inception_score"] == pytest.approx(exact, rel=1e-9)
