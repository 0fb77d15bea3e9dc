"""Bounds and likelihoods of the exact denoiser, against the density itself."""

import math

import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.evals import likelihood
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.variance_exploding import VarianceExploding

PROCESSES = {
    "cosine": Gaussian(schedule=Cosine(), prediction="v"),
    "flow": Gaussian(schedule=Flow(), prediction="velocity", sigma_data=0.5),
    "exploding": Gaussian(
        schedule=VarianceExploding(sigma_min=1e-3), prediction="eps", sigma_data=0.5
    ),
}
ONE = np.array([[0.3, -0.2]])
THREE = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])


def log_p(context, process, x, label=None, num_steps=64, num_probes=0):
    function = likelihood.flow(process, num_steps, num_probes)
    index = np.arange(len(x), dtype=np.int32)
    return np.float64(context.compute(function, x, label, index))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_flow_of_a_gaussian_has_its_density(process, exact_context):
    # Without a mean under the last one: its prior misses mean / 50.
    means = 0 * ONE if process is PROCESSES["exploding"] else ONE
    context = exact_context(process, means, 0.5, number=64)
    found = log_p(context, process, context.test.x)[0]
    exact = context.test.log_density(context.test.x)
    np.testing.assert_allclose(found, exact, atol=1e-3)


DEFAULTS = ("cosine", "linear_beta", "variance_exploding")


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_flow_has_the_density_of_data_with_the_noise_of_time_0(name, exact_context):
    """Of narrow data under a schedule that starts at little noise, but some."""
    schedule, std = registry.build("schedule", {"name": name}, "schedule"), 0.1
    process = Gaussian(schedule=schedule, prediction="v", sigma_data=std)
    context = exact_context(process, np.zeros((1, 2)), std, number=64)
    x = context.test.x
    variance = std**2 + math.exp(-float(schedule.logsnr(np.float32(0))))
    exact = -np.sum(x**2, 1) / (2 * variance) - math.log(2 * math.pi * variance)
    np.testing.assert_allclose(log_p(context, process, x)[0], exact, atol=1e-3)
    clean = context.test.log_density(x)
    assert (np.abs(exact - clean).max() > 1e-2) == (name != "cosine")


def test_the_flow_of_a_mixture_has_its_density(exact_context):
    # At logsnr -15 the prior would still miss alpha_1 times the mean: 2e-3 nats.
    process = Gaussian(schedule=Cosine(logsnr_min=-18.0), prediction="v")
    context = exact_context(process, THREE, 0.2, num_classes=3, number=96)
    x, label = context.test.x, context.test.label
    exact = context.test.log_density(x, label)
    found = log_p(context, process, x, label, num_steps=128)[0]
    np.testing.assert_allclose(found, exact, atol=1e-3)
    null, exact = np.full_like(label, 3), context.test.log_density(x)
    errors = [
        np.abs(log_p(context, process, x, null, num_steps=n)[0] - exact).max()
        for n in (64, 128)
    ]
    assert errors[1] < 1e-3
    # Order 4, and rounding of about 5e-5.
    assert errors[0] > 8 * errors[1]


def test_hutchinson_is_right_within_its_standard_error(exact_context):
    process = PROCESSES["cosine"]
    context = exact_context(process, THREE, 0.2, number=96)
    x = context.test.x
    found = log_p(context, process, x, num_probes=32)
    exact = log_p(context, process, x)[0]
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    assert error.max() > 0.01, "each probe says something else"
    assert np.abs(np.mean(found.mean(0) - exact)) < 4 * np.sqrt(np.sum(error**2)) / len(
        x
    )


@pytest.mark.parametrize("name", ["cosine", "exploding"])
def test_the_bound_of_a_gaussian_is_known_in_closed_form(name, exact_context):
    """Per dimension: 1/2 (log((1 + c e^l0) / (1 + c e^l1)) + log 2 pi e - l0) + KL."""
    process, std = PROCESSES[name], 0.5
    context = exact_context(process, np.zeros((1, 2)), std, number=400)
    evaluator = likelihood.Likelihood(flow=False, num_times=32)
    numbers = evaluator(context).numbers
    logsnr = [float(process.schedule.logsnr(np.float32(end))) for end in (0, 1)]
    alpha, sigma = (float(q) for q in process.schedule.alpha_sigma(np.float32(1)))
    top, low = (math.log1p(std**2 * math.exp(lam)) for lam in logsnr)
    total = (alpha * process.sigma_data) ** 2 + sigma**2
    prior = (alpha**2 * std**2 + sigma**2) / total - 1 - math.log(sigma**2 / total)
    terms = {
        "diffusion": (top - low) / 2,
        "prior": prior / 2,
        "reconstruction": (math.log(2 * math.pi * math.e) - logsnr[0]) / 2,
    }
    for term, exact in terms.items():
        found = numbers[f"bound_{term}"] * math.log(2)
        # 400 x 32 x 2 squared normal variables, weighted by at most 1: 0.02 nats each.
        assert found == pytest.approx(exact, abs=0.06 if term == "diffusion" else 2e-4)
    exact = 0.5 * math.log(2 * math.pi * math.e * std**2) / math.log(2)
    assert numbers["bound_bits"] == pytest.approx(exact, abs=0.1)


def test_the_bound_of_a_mixture_is_tight_given_the_label_and_without(exact_context):
    process = PROCESSES["cosine"]
    context = exact_context(process, THREE, 0.2, num_classes=3, number=600)
    test = context.test
    for conditional in (True, False):
        evaluator = likelihood.Likelihood(
            num_examples=600, num_times=48, conditional=conditional
        )
        numbers = evaluator(context).numbers
        nats = -test.log_density(test.x, test.label if conditional else None)
        # The noise of the bound is its own; the examples are the same.
        noise = numbers["bound_error"] * 2 * math.log(2)
        assert numbers["bound_nats"] == pytest.approx(nats.mean(), abs=4 * noise)
        assert numbers["flow_nats"] == pytest.approx(nats.mean(), abs=2e-3)
        assert numbers["bound_bits"] * 2 * math.log(2) == pytest.approx(
            numbers["bound_nats"]
        )
        entropy = math.log(2 * math.pi * math.e * 0.2**2) + (
            0 if conditional else math.log(3)
        )
        if conditional:
            assert nats.mean() == pytest.approx(entropy, abs=4 * nats.std() / 600**0.5)


class Levels:
    """Integers as a source: entries of x are one of `number` values."""

    def __init__(self, source, number):
        self.spec, self.label = source.spec, source.label
        index = np.clip(np.round((source.x + 1) * (number - 1) / 2), 0, number - 1)
        self.x = (2 * index / (number - 1) - 1).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": self.label[index]}


def test_probabilities_of_levels(exact_context):
    """Fine levels of smooth data: P(v) = p(v) times the distance of two levels.

    The denoiser does not know the levels, so its bound pays for every scale below them:
    the decoder is free and the diffusion term is that of a density.
    """
    process, number, std = PROCESSES["cosine"], 64, 0.25
    context = exact_context(process, np.zeros((1, 2)), std, number=400)
    context = context._replace(test=Levels(context.test, number))
    numbers = likelihood.Likelihood(levels=number, num_steps=24)(context).numbers
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2) - math.log(2 / (number - 1))
    error = 4 * numbers["flow_error"]
    assert numbers["flow_bits"] == pytest.approx(entropy / math.log(2), abs=error)
    diffusion = 0.5 * math.log1p(std**2 * math.exp(15)) / math.log(2)
    # As above, 0.06 nats.
    assert numbers["bound_diffusion"] == pytest.approx(diffusion, abs=0.09)
    assert numbers["bound_reconstruction"] < 1e-3, "z_0 says which level it is"
    # Where the noise is a third of the distance of two levels, little is lost.
    end = -2 * math.log(2 / (number - 1) / 3)
    early = likelihood.Likelihood(levels=number, flow=False, logsnr_max=end)
    shorter = early(context).numbers
    assert 0 < shorter["bound_bits"] - entropy / math.log(2) + 0.15 < 0.6
    assert shorter["bound_reconstruction"] > 0.01


def test_the_note_says_of_what_the_density_is(exact_context):
    context = exact_context(PROCESSES["exploding"], 0 * ONE, 0.5, number=4)
    result = likelihood.Likelihood(bound=False, num_steps=1)(context)
    assert result.notes["flow"] == (
        "divergence exact; density of data with the noise of t = 0, logsnr 13.82"
    )


@pytest.mark.parametrize("end", [-15.0, -20.0, math.nan])
def test_a_bound_ends_before_there_is_noise_alone(end, exact_context):
    evaluator = likelihood.Likelihood(logsnr_max=end)
    with pytest.raises(ValueError, match="^logsnr_max: must be above -15, the sched"):
        evaluator.check_process(PROCESSES["cosine"])
    with pytest.raises(ValueError, match="^logsnr_max"):
        evaluator(exact_context(PROCESSES["cosine"], ONE, 0.5, number=2))
    likelihood.Likelihood(logsnr_max=40.0).check_process(PROCESSES["cosine"])


def test_what_does_not_fit_is_refused(exact_context):
    context = exact_context(PROCESSES["cosine"], ONE, 0.5)
    with pytest.raises(ValueError, match="levels: the data are not 256"):
        likelihood.Likelihood(levels=256)(context)
    for field in ("num_examples", "batch_size", "num_times", "num_steps"):
        with pytest.raises(ValueError, match=f"{field}: must be at least 1, got 0"):
            likelihood.Likelihood(**{field: 0})
    with pytest.raises(ValueError, match="levels: must be at least 2"):
        likelihood.Likelihood(levels=1)
    with pytest.raises(ValueError, match="num_probes"):
        likelihood.Likelihood(num_probes=-1)
    with pytest.raises(ValueError, match="bound, flow"):
        likelihood.Likelihood(bound=False, flow=False)
