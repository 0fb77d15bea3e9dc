import types as python_types

import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.evals import mixture

MEANS = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
STD = 0.4


class Source:
    means, weights, std = MEANS, WEIGHTS, STD
    spec = types.DataSpec((2,), 3)

    def __init__(self, seed, number=1500):
        rng = np.random.default_rng(seed)
        self.label = rng.choice(3, number, p=WEIGHTS).astype(np.int32)
        noise = rng.normal(size=(number, 2))
        self.x = (MEANS[self.label] + STD * noise).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": self.label[index]}


class Cosine:
    """alpha, sigma of the plain cosine schedule, in numpy."""

    def alpha_sigma(self, t):
        return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)


def draw(number, std=STD):
    label = np.arange(number) % 3
    noise = np.random.default_rng(7).normal(size=(number, 2))
    return (MEANS[label] + std * noise).astype(np.float32), label.astype(np.int32)


def exact(z_t, t, label, conditional=True):
    alpha, sigma = Cosine().alpha_sigma(t[0])
    known = label if conditional else None
    x = mixture.exact_x(z_t, alpha, sigma, MEANS, WEIGHTS, STD, known)
    return types.Prediction(x, None)


def context(predict=exact, draw=draw, spec=Source.spec):
    process = python_types.SimpleNamespace(schedule=Cosine())
    return types.EvalContext(
        1, spec, Source(0), Source(1), draw, None, predict, None, process, None
    )


def test_exact_denoiser_is_the_mean_of_the_posterior():
    """Against the average over many x, each weighted by how well it explains z_t."""
    rng = np.random.default_rng(0)
    number = 400_000
    component = rng.choice(3, number, p=WEIGHTS)
    x = MEANS[component] + STD * rng.normal(size=(number, 2))
    z_t = np.array([[0.5, 0.9], [-0.4, 0.1]])
    alpha, sigma = 0.6, 0.8
    for label in (None, np.array([2, 1])):
        got = mixture.exact_x(z_t, alpha, sigma, MEANS, WEIGHTS, STD, label)
        for i, z in enumerate(z_t):
            weight = np.exp(-np.sum((z - alpha * x) ** 2, axis=1) / (2 * sigma**2))
            if label is not None:
                weight = weight * (component == label[i])
            expected = weight @ x / weight.sum()
            assert got[i] == pytest.approx(expected, abs=0.02)


def test_exact_denoiser_at_both_ends_of_time():
    z_t = np.array([[2.1, 0.3]])
    clean = mixture.exact_x(z_t, 1.0, 0.0, MEANS, WEIGHTS, STD)
    noise = mixture.exact_x(z_t, 0.0, 1.0, MEANS, WEIGHTS, STD)
    assert clean == pytest.approx(z_t)
    assert noise[0] == pytest.approx(WEIGHTS @ MEANS)


def test_the_exact_denoiser_has_no_excess():
    numbers = mixture.Mixture()(context()).numbers
    assert numbers["excess"] < 1e-10
    assert 0 < numbers["bayes"] < STD**2, "given its label, x varies by std² at most"


def test_excess_is_the_squared_distance_to_the_exact_denoiser():
    def biased(z_t, t, label):
        return types.Prediction(exact(z_t, t, label).x + 0.1, None)

    numbers = mixture.Mixture(num_levels=4)(context(biased)).numbers
    assert numbers["excess"] == pytest.approx(0.01)
    levels = [name for name in numbers if name.startswith("excess_by_logsnr/")]
    assert len(levels) == 4


def test_without_labels_the_component_is_not_known():
    spec = types.DataSpec((2,))
    unlabelled = lambda z_t, t, label: exact(z_t, t, label, conditional=False)  # noqa: E731
    numbers = mixture.Mixture()(context(unlabelled, spec=spec)).numbers
    assert numbers["excess"] < 1e-10
    assert numbers["inside"] > 0.98


def test_samples_of_the_mixture_itself_have_the_right_statistics():
    result = mixture.Mixture(num_samples=1500)(context())
    numbers = result.numbers
    assert numbers["inside"] == pytest.approx(0.9973, abs=0.004)
    assert numbers["mean_error"] < 0.1
    assert numbers["std_ratio"] == pytest.approx(1, abs=0.04)
    assert numbers["sliced_wasserstein"] < 2 * numbers["sliced_wasserstein_real"] + 0.02
    assert result.pictures["scatter"].shape == (360, 720, 3)


def test_too_wide_samples_show_in_every_statistic():
    wide = lambda number: draw(number, std=2 * STD)  # noqa: E731
    numbers = mixture.Mixture()(context(draw=wide)).numbers
    assert numbers["std_ratio"] == pytest.approx(2, abs=0.1)
    assert numbers["inside"] < 0.85
    assert numbers["sliced_wasserstein"] > 2 * numbers["sliced_wasserstein_real"]


def test_statistics_by_hand():
    x = np.array([[3.0], [1.0], [10.0], [14.0]])
    label, means = np.array([0, 0, 1, 1]), np.array([[2.0], [10.0]])
    numbers = mixture.sample_statistics(x, label, means, std=1.0)
    assert numbers["inside"] == 0.75, "14 lies four standard deviations off"
    assert numbers["mean_error"] == 1, "means 2 and 12 instead of 2 and 10"
    assert numbers["std_ratio"] == pytest.approx(np.sqrt((2 + 8) / 2))


def test_sliced_wasserstein_of_a_shift_in_one_dimension_is_the_shift():
    x = np.random.default_rng(0).normal(size=(100, 1))
    assert mixture.sliced_wasserstein(x, x + 0.3, 4) == pytest.approx(0.3)


def test_another_source_is_refused_by_name():
    other = context()._replace(test=[1, 2])
    with pytest.raises(ValueError, match="is list"):
        mixture.Mixture()(other)
