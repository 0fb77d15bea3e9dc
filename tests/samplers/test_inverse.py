"""Inverse use of samplers on gaussian data, where every step is an affine map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import keys as keys_lib
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import grids, inverse
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.samplers.edm import Heun
from diffusionlab.samplers.probability_flow import ProbabilityFlow
from diffusionlab.samplers.restart import Restart
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import Prediction, lift

COSINE = Gaussian(schedule=Cosine(), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="velocity")
MEAN = np.array([0.3, -0.2])
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])
KNOWN = np.array([True, False])
X_KNOWN = 1.5
PLAIN = Ddim(num_steps=50)


def denoiser(process, covariance, mean=MEAN):
    """The exact prediction for data N(mean, covariance)."""
    values, vectors = (jnp.float32(q) for q in np.linalg.eigh(covariance))
    mean = jnp.asarray(mean, jnp.float32)

    def predict(z_t, t):
        alpha, sigma = process.schedule.alpha_sigma(lift(t, z_t.ndim))
        offset = (z_t - alpha * mean) @ vectors / (alpha**2 * values + sigma**2)
        return Prediction(
            mean + alpha * (values * offset) @ vectors.T, sigma * offset @ vectors.T
        )

    return predict


def keys(number):
    return keys_lib.sample_keys(0, jnp.arange(number))


def scales(process, times):
    return tuple(
        np.float64(q) for q in process.schedule.alpha_sigma(jnp.asarray(times))
    )


def gain(alpha, sigma, covariance):
    """J with x_hat = mean + J (z - alpha mean), in float64."""
    total = alpha**2 * covariance + sigma**2 * np.eye(len(covariance))
    return alpha * np.linalg.solve(total, covariance)


def ddim_maps(alpha, sigma, jacobians):
    """The matrix of each DDIM step for x_hat = J z, deviations from the mean."""
    found = []
    for i, jacobian in enumerate(jacobians):
        eps = (np.eye(len(jacobian)) - alpha[i] * jacobian) / sigma[i]
        found.append(alpha[i + 1] * jacobian + sigma[i + 1] * eps)
    return found


@pytest.mark.parametrize("process", [COSINE, FLOW], ids=["cosine", "flow"])
def test_the_code_of_a_gaussian_is_the_exact_map(process):
    """z_1 = sqrt(V_1 / V_0) (z_0 - alpha_0 m) + alpha_1 m; DDIM is of order 1."""
    x, std = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), 0.5
    predict = denoiser(process, std**2 * np.eye(2))
    (alpha_0, alpha_1), (sigma_0, sigma_1) = scales(process, [0.0, 1.0])
    ratio = (alpha_1**2 * std**2 + sigma_1**2) / (alpha_0**2 * std**2 + sigma_0**2)
    exact = np.sqrt(ratio) * alpha_0 * (x - MEAN) + alpha_1 * MEAN
    code_errors, trip_errors = [], []
    for num_steps in (40, 80):
        sampler = Ddim(num_steps=num_steps)
        code = inverse.encode(sampler, process, predict, x)
        code_errors.append(np.abs(code - exact).max())
        back = inverse.decode(sampler, process, predict, code)
        trip_errors.append(np.abs(back - x).max())
    for errors in (code_errors, trip_errors):
        # Order 1 halves the error; the next order changes the ratio by a few per cent.
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert code_errors[1] < 0.06 and trip_errors[1] < 0.06


def test_times_are_cut_at_exactly_the_start():
    times = np.float32([1.0, 0.75, 0.5, 0.25, 0.0])
    np.testing.assert_array_equal(
        inverse.cut(times, 0.6), np.float32([0.6, 0.5, 0.25, 0])
    )
    np.testing.assert_array_equal(inverse.cut(times, 0.5), np.float32([0.5, 0.25, 0]))
    np.testing.assert_array_equal(inverse.cut(times, 1.0), times)
    np.testing.assert_array_equal(inverse.cut(times, 0.1), np.float32([0.1, 0.0]))
    for start in (0.0, 1.1):
        with pytest.raises(ValueError, match="start"):
            inverse.cut(times, start)


def test_loops_above_the_start_are_left_out_and_others_kept_whole():
    high, low = [0.9, 0.7, 0.6], [0.5, 0.4, 0.2]
    times = np.float32([1, 0.8, 0.6, *high, *high, 0.3, 0.2, *low, *low, 0.1, 0])

    def cut(start):
        return inverse.cut(times, start).tolist()

    below = np.float32([0.3, 0.2, *low, *low, 0.1, 0]).tolist()
    assert cut(1.0) == times.tolist()
    assert cut(0.95) == np.float32([0.95, *times[1:]]).tolist()
    assert cut(0.9) == np.float32([0.9, *times[1:]]).tolist()
    assert cut(0.85) == np.float32([0.85, 0.8, 0.6, *below]).tolist()
    assert cut(0.65) == np.float32([0.65, 0.6, *below]).tolist()
    assert cut(0.6) == np.float32([0.6, *below]).tolist()
    assert cut(0.45) == np.float32([0.45, 0.3, 0.2, 0.1, 0]).tolist()
    assert cut(0.2) == np.float32([0.2, 0.1, 0]).tolist()


@pytest.mark.parametrize("start", [0.3, 0.8])
def test_from_the_middle_the_distance_to_the_source_is_exact(start):
    """The ODE takes z to m + sqrt(c / V) (z - alpha m), so with x itself from the data
    E (x' - x)² = 2 c (1 - alpha sqrt(c / V))."""
    number, std = 20_000, 0.5
    sampler = Ddim(num_steps=100)
    x = MEAN + std * np.random.default_rng(0).normal(size=(number, 2))
    run = jax.jit(
        lambda x, keys: inverse.from_middle(
            sampler, COSINE, denoiser(COSINE, std**2 * np.eye(2)), x, start, keys
        )
    )
    found = np.float64(run(jnp.float32(x), keys(number)))
    alpha, sigma = scales(COSINE, start)
    share = std * alpha / np.sqrt(alpha**2 * std**2 + sigma**2)
    exact = 2 * std**2 * (1 - share)
    # 40,000 values of relative variance 2, and 1 % for the steps.
    assert np.mean((found - x) ** 2) == pytest.approx(exact, rel=0.03 + 0.01)
    assert np.mean((found - MEAN) ** 2) == pytest.approx(std**2, rel=0.04)
    assert found.mean(0) == pytest.approx(MEAN, abs=4 * std / number**0.5 + 1e-3)


def exact_replacement(process, num_steps, covariance):
    """Mean and variance of the unknown coordinate for DDIM, from the recursion.

    The known coordinate of z_t is drawn afresh at every t, with mean alpha x and
    variance sigma², so it is independent of the unknown one.
    """
    alpha, sigma = scales(process, grids.Uniform()(None, num_steps))
    jacobians = [
        gain(a, s, covariance) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)
    ]
    offset = X_KNOWN - MEAN[0]
    mean, variance = -alpha[0] * MEAN[1], alpha[0] ** 2 + sigma[0] ** 2
    for i, map_ in enumerate(ddim_maps(alpha, sigma, jacobians)):
        if i == num_steps - 1:
            map_ = jacobians[i]
        mean = map_[1, 1] * mean + map_[1, 0] * alpha[i] * offset
        variance = map_[1, 1] ** 2 * variance + map_[1, 0] ** 2 * sigma[i] ** 2
    return mean + MEAN[1], variance


@functools.cache
def unknown(
    method, covariance, process=COSINE, *, sampler=PLAIN, number=20_000, **options
):
    """`number` fills, float64."""
    predict = denoiser(process, np.array(covariance))
    x = jnp.full((number, 2), X_KNOWN, jnp.float32)

    @jax.jit
    def run(keys):
        if method == "replacement":
            return inverse.replacement(
                sampler, process, predict, x, KNOWN, keys, **options
            )
        guided = inverse.reconstruction(process, predict, x, KNOWN, **options)
        z = process.prior_from(keys, (2,))
        times = sampler.times(process.schedule)
        return sampler.final(
            inverse.base.solve(sampler, process, guided, z, times, keys)
        )

    return np.float64(run(keys(number)))


TIED = tuple(map(tuple, COVARIANCE))
FREE = ((1.0, 0.0), (0.0, 0.25))


@pytest.mark.parametrize("process", [COSINE, FLOW], ids=["cosine", "flow"])
def test_replacement_follows_its_recursion(process):
    found = unknown("replacement", TIED, process)[:, 1]
    mean, variance = exact_replacement(process, 50, COVARIANCE)
    # The standard error of the mean is 0.007 at most, that of the variance 1 %.
    assert found.mean() == pytest.approx(mean, abs=0.025)
    assert found.var() == pytest.approx(variance, rel=0.04)


def test_replacement_is_biased_and_repetition_brings_it_to_the_conditional():
    """Of x_2 given x_1: mean m_2 + 0.8 (x_1 - m_1) = 0.76 and variance 0.36."""
    exact, errors = MEAN[1] + 0.8 * (X_KNOWN - MEAN[0]), []
    for resample in (1, 16):
        sampler = Ancestral(num_steps=20, noise_exponent=0.0)
        options = {"sampler": sampler, "resample": resample, "number": 2000}
        found = unknown("replacement", TIED, COSINE, **options)[:, 1]
        errors.append(abs(found.mean() - exact))
    # The standard error is 0.6 / sqrt(2000) = 0.013.
    assert errors[0] > 0.1, "without repetition the mean is far off"
    assert errors[1] < 0.06 and errors[1] < 0.5 * errors[0]
    # A posterior step of few has too little variance, as in sampling without x.
    assert 0.2 < found.var() < 0.36


@pytest.mark.parametrize("method", ["replacement", "reconstruction"])
def test_what_is_independent_of_the_known_part_keeps_its_law(method):
    found = unknown(method, FREE)[:, 1]
    plain = denoiser(COSINE, np.array(FREE))
    z = COSINE.prior_from(keys(20_000), (2,))
    unguided = inverse.decode(PLAIN, COSINE, plain, z)[:, 1]
    assert found.mean() == pytest.approx(MEAN[1], abs=4 * 0.5 / 20_000**0.5 + 0.002)
    # Both take the same affine map of gaussian noise: 2 % are four standard errors.
    assert found.std() == pytest.approx(float(unguided.std()), rel=0.02)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("process", [COSINE, FLOW], ids=["cosine", "flow"])
def test_reconstruction_guidance_follows_its_recursion(process, weight):
    """x~ = x_hat + weight alpha J' K (x - x_hat): affine, so moments are exact."""
    num_steps = 50
    alpha, sigma = scales(process, grids.Uniform()(None, num_steps))
    mean = -alpha[0] * MEAN
    covariance = (alpha[0] ** 2 + sigma[0] ** 2) * np.eye(2)
    for i in range(num_steps):
        jacobian, mask = gain(alpha[i], sigma[i], COVARIANCE), np.diag([1.0, 0.0])
        pull = weight * alpha[i] * jacobian.T @ mask
        guided = jacobian - pull @ jacobian
        shift = pull @ (np.array([X_KNOWN, 0.0]) - MEAN)
        map_, add = guided, shift
        if i < num_steps - 1:
            map_ = ddim_maps(alpha[i:], sigma[i:], [guided])[0]
            add = (alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i]) * shift
        mean, covariance = map_ @ mean + add, map_ @ covariance @ map_.T
    found = unknown("reconstruction", TIED, process, weight=weight)
    assert found.mean(0) == pytest.approx(mean + MEAN, abs=0.025)
    assert found.var(0) == pytest.approx(np.diag(covariance), rel=0.04, abs=1e-4)


def test_steps_are_repeated_by_a_sampler_that_goes_up_as_well():
    """The known part tells nothing; 5 standard errors of 2000 numbers."""
    sampler = Restart(num_steps=20, grid=grids.Rho())
    options = {"sampler": sampler, "resample": 2, "number": 2000}
    found = unknown("replacement", FREE, COSINE, **options)[:, 1]
    assert found.mean() == pytest.approx(MEAN[1], abs=5 * 0.5 / 2000**0.5)
    assert found.std() == pytest.approx(0.5, rel=5 * 4000**-0.5)


def test_an_adaptive_sampler_follows_the_guided_ode():
    """It has a time for each example; the steps of DDIM are of order 1."""
    run = functools.partial(unknown, "reconstruction", TIED, FLOW, number=4)
    solved = run(sampler=ProbabilityFlow())
    errors = [
        np.abs(run(sampler=Ddim(num_steps=number)) - solved).max()
        for number in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] < 0.05


def test_a_fill_depends_on_its_own_key():
    x = jnp.full((6, 2), X_KNOWN, jnp.float32)
    predict = denoiser(COSINE, COVARIANCE)
    sampler = Ancestral(num_steps=4)

    @jax.jit
    def fill(keys):
        args = (sampler, COSINE, predict, x, KNOWN, keys)
        return inverse.replacement(*args, resample=2)

    others = keys_lib.sample_keys(1, jnp.arange(6)).at[3].set(keys(6)[3])
    first, second = np.asarray(fill(keys(6))), np.asarray(fill(others))
    np.testing.assert_array_equal(first[3], second[3])
    assert len(np.unique(first[:, 1])) == 6 and first[0, 1] != second[0, 1]


EXPLODING = Gaussian(schedule=Edm(preserving=False), prediction="x", sigma_data=0.5)
CHURN = functools.partial(Heun, num_steps=18, grid=grids.Rho(), churn=40.0)


@pytest.mark.parametrize(
    ("sampler", "process", "expected"),
    [
        (Ddim(num_steps=4), COSINE, True),
        (Ddim(num_steps=8, grid=grids.Logsnr(logsnr_max=12.0)), COSINE, True),
        # It is out of steps and returns NaN, but no noise.
        (ProbabilityFlow(max_steps=1), FLOW, True),
        (Ddim(num_steps=4, eta=0.1), COSINE, False),
        (Ancestral(num_steps=4), COSINE, False),
        (Restart(num_steps=18, grid=grids.Rho()), COSINE, False),
        # The levels between are 0.002, 0.0048 and 0.0105 of sigma / alpha.
        (CHURN(churn_max=0.0025), EXPLODING, False),
        (CHURN(churn_min=0.0025, churn_max=0.0027), EXPLODING, True),
    ],
)
def test_samplers_that_draw_noise_are_refused(sampler, process, expected):
    assert inverse.is_deterministic(sampler, process, (3,)) is expected
    if not expected:
        with pytest.raises(ValueError, match="sampler: .* draws fresh noise"):
            inverse.check_deterministic(sampler, process, (3,))
