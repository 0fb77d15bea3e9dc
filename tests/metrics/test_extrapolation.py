import feature_sets
import numpy as np
import pytest

from diffusionlab.metrics import extrapolation, frechet, inception_score, moments
from diffusionlab.metrics.extrapolation import FrechetInfinity, InceptionScoreInfinity


def test_a_straight_line_in_one_over_n_is_continued_exactly():
    numbers = extrapolation.sizes(50_000, 5000, 15)
    assert (numbers[0], numbers[-1], len(numbers)) == (5000, 50_000, 15)
    assert np.ptp(np.diff(numbers)) <= 1
    scores = 3 + 7000 / numbers
    assert extrapolation.extrapolate(numbers, scores) == pytest.approx(3, abs=1e-10)


def test_small_sets_begin_at_half_of_them():
    assert extrapolation.sizes(1000, 5000, 3).tolist() == [500, 750, 1000]
    with pytest.raises(ValueError, match="points: 15 different numbers up to 20"):
        extrapolation.sizes(20, 5000, 15)


class Exact(feature_sets.Arrays):
    """N(0, I_d) itself."""

    def moments(self, output):
        d = self.features.shape[1]
        return moments.Moments(2, np.zeros(d), np.eye(d))


def test_the_bias_of_the_frechet_distance_is_gone():
    d, num, repeats = 12, 600, 24
    other = Exact("the reference", np.zeros((2, d)))
    metric, plain, found = FrechetInfinity(smallest=100, groups=0), [], []
    for seed in range(repeats):
        rows = np.random.default_rng(seed).normal(size=(num, d))
        samples = feature_sets.Arrays(features=rows)
        found.append(metric(samples, other).numbers["frechet_infinity"])
        plain.append(frechet.Frechet(groups=0)(samples, other).numbers["frechet"])
    bias = (d + d * (d + 1) / 4) / num
    # Six standard errors of the mean are less than the bias, so both claims have force.
    error = 3 * np.std(found) / repeats**0.5
    assert error < bias / 2
    assert abs(np.mean(found)) < error
    assert np.mean(plain) == pytest.approx(bias, rel=0.1)


def test_the_bias_of_the_inception_score_is_gone():
    rng = np.random.default_rng(0)
    population = 3 * rng.normal(size=(20_000, 10))
    exact = inception_score.score(inception_score.sums(population))
    metric, plain, found = (
        InceptionScoreInfinity(smallest=20, points=5, groups=0),
        [],
        [],
    )
    for _ in range(200):
        logits = population[rng.choice(len(population), 60, replace=False)]
        samples = feature_sets.Arrays(logits=logits)
        found.append(metric(samples, None).numbers["inception_score_infinity"])
        plain.append(inception_score.score(inception_score.sums(logits)))
    error = 3 * np.std(found) / 200**0.5
    assert exact - np.mean(plain) > error, "at 60 samples it is too small"
    assert np.mean(found) == pytest.approx(exact, abs=error)


def test_intervals_cover():
    rng, d = np.random.default_rng(1), 4
    other = feature_sets.reference(rng.normal(size=(500, d)))
    results = []
    for _ in range(60):
        rows = 1.2 * rng.normal(size=(240, d)) + 0.3
        samples = feature_sets.Arrays(features=rows, logits=3 * rows)
        results.append(
            (FrechetInfinity()(samples, other), InceptionScoreInfinity()(samples, None))
        )
    for i, name in enumerate(("frechet_infinity", "inception_score_infinity")):
        numbers = [result[i].numbers[name] for result in results]
        inside = [
            result[i].intervals[name][0]
            <= np.mean(numbers)
            <= result[i].intervals[name][1]
            for result in results
        ]
        # 0.95 less 3 standard deviations of a share of 60.
        assert np.mean(inside) >= 0.865, name
        half = np.mean([np.ptp(result[i].intervals[name]) / 2 for result in results])
        assert half == pytest.approx(2.262 * np.std(numbers), rel=0.35), name


def test_options_and_sets_are_checked():
    with pytest.raises(ValueError, match="points: must be at least 2"):
        FrechetInfinity(points=1)
    with pytest.raises(ValueError, match="repeats: must be at least 2"):
        InceptionScoreInfinity(repeats=1)
    with pytest.raises(ValueError, match="smallest: must be above 0"):
        FrechetInfinity(smallest=0)
    a, b, _ = feature_sets.golden()
    with pytest.raises(ValueError, match="32 and 31 entries"):
        FrechetInfinity()(
            feature_sets.Arrays(features=b), feature_sets.reference(a[:, 1:])
        )
    few = feature_sets.Arrays(features=b[:60])
    result = FrechetInfinity()(few, feature_sets.reference(a))
    assert "30 samples of 32 features" in result.notes["warning"]


def test_a_seed_is_one_answer():
    a, b, _ = feature_sets.golden()
    sets = feature_sets.Arrays(features=b), feature_sets.reference(a)
    assert FrechetInfinity()(*sets) == FrechetInfinity()(*sets)
    assert FrechetInfinity(seed=1)(*sets) != FrechetInfinity()(*sets)
