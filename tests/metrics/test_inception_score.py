import feature_sets
import numpy as np
import pytest

from diffusionlab.metrics import inception_score
from diffusionlab.metrics.inception_score import InceptionScore


def measured(logits, **options):
    return InceptionScore(**options)(feature_sets.Arrays(logits=logits), None)


def test_golden_value():
    logits = feature_sets.golden()[2]
    numbers = measured(logits).numbers
    assert numbers["inception_score"] == pytest.approx(5.6513320438, abs=1e-9)
    assert numbers["inception_score_std"] == pytest.approx(0.2902287087, abs=1e-9)


@pytest.mark.parametrize(
    "logits, exact",
    [
        (np.zeros((8, 5)), 1.0),
        (1e4 * np.tile(np.eye(5), (4, 1)), 5.0),
        (1e4 * np.eye(2)[[0, 0, 0, 1]], 1.7547653506),
    ],
)
def test_known_scores(logits, exact):
    found = measured(logits, splits=1, seed=None).numbers
    assert found["inception_score"] == pytest.approx(exact, abs=1e-9)
    assert found["inception_score_std"] == 0


def test_splits_are_in_order_without_a_seed():
    logits = 1e4 * np.repeat(np.eye(2), 4, axis=0)
    assert inception_score.split_scores(logits, 2, None).tolist() == [1, 1]
    assert inception_score.split_scores(logits, 1, None) == pytest.approx([2])
    assert inception_score.split_scores(logits, 2, 2020).max() > 1.5


def test_sums_add_up():
    logits = feature_sets.golden()[2]
    parts = [inception_score.sums(part) for part in np.split(logits, [10, 400])]
    whole = inception_score.sums(logits)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-12)


@pytest.mark.parametrize("splits", [1, 10])
def test_intervals_cover(splits):
    rng, metric = np.random.default_rng(2), InceptionScore(splits=splits)
    results = [
        metric(feature_sets.Arrays(logits=3 * rng.normal(size=(300, 6))), None)
        for _ in range(100)
    ]
    numbers = [result.numbers["inception_score"] for result in results]
    ends = np.array([result.intervals["inception_score"] for result in results])
    inside = (ends[:, 0] <= np.mean(numbers)) & (np.mean(numbers) <= ends[:, 1])
    # 0.95 less 3 standard deviations of a share of 100.
    assert inside.mean() >= 0.885
    assert np.diff(ends).mean() == pytest.approx(4.5 * np.std(numbers), rel=0.3)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="splits: 10 splits of 9 samples"):
        measured(np.zeros((9, 2)))
    with pytest.raises(ValueError, match="splits: must be above 0"):
        InceptionScore(splits=0)
    bad = np.zeros((20, 2))
    bad[4] = np.nan
    with pytest.raises(ValueError, match="samples: 1 of 20 rows of 'logits'"):
        measured(bad)
    assert measured(np.zeros((5, 2)), splits=1).intervals == {}
