"""Samplers on gaussian data, where every number is known."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import gaussian

from diffusionlab import keys as keys_lib
from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, grids
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.variance_exploding import VarianceExploding
from diffusionlab.types import DataSpec, Prediction

SAMPLERS = [name for name in registry.table("sampler") if "token_" not in name]
# What a sampler needs on vectors of a few entries beside its number of steps.
OPTIONS = {
    "covariance": {"basis": {"name": "pixel_isotropic"}},
    "euler_maruyama": {"grid": {"name": "logsnr"}},
    "predictor_corrector": {"grid": {"name": "logsnr"}},
}
# Evaluations that are Jacobian-vector products, in four steps.
DERIVATIVES = {"covariance": 4}
PROCESS = Gaussian(schedule=Cosine(), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="x")
WIDE = Gaussian(schedule=Cosine(logsnr_min=-40.0, logsnr_max=40.0), prediction="v")
NONE, FULL = (Ancestral(num_steps=1, noise_exponent=gamma) for gamma in (0.0, 1.0))
UNIFORM = grids.Uniform()
NUM_STEPS = (1, 2, 3, 8, 10, 100)


def build(name, num_steps):
    block = {"name": name, "num_steps": num_steps, **OPTIONS.get(name, {})}
    return registry.build("sampler", block, "config.sampler")


@functools.cache
def coefficients(sampler, process, mean=0.0, std=1.0):
    """What the steps do to z: `{N: (factor [N], addition [N])}`, in float64.

    The noise of a step is replaced by ones; without data mean, `addition` is its scale.
    """
    grids = {n: UNIFORM(None, n) for n in NUM_STEPS}
    predict = gaussian(process, mean, std)
    keys = jax.random.split(jax.random.key(0), 1)

    def latent(z, t, s):
        state = sampler.init(jnp.full((1, 1), z), t)
        return sampler.step(process, predict, state, t, s, keys).z[0, 0]

    def ones(keys, shape):
        return jnp.ones((keys.shape[0], *shape))

    with mock.patch.object(base, "normal", ones):
        step = jax.jit(jax.vmap(jax.value_and_grad(latent), (None, 0, 0)))
        addition, factor = step(
            0.0,
            np.concatenate([grid[:-1] for grid in grids.values()]),
            np.concatenate([grid[1:] for grid in grids.values()]),
        )
    ends = np.cumsum(NUM_STEPS)[:-1]
    split = (np.split(np.float64(q), ends) for q in (factor, addition))
    return dict(zip(NUM_STEPS, zip(*split, strict=True), strict=True))


def variances(signal, noise, start=1.0):
    found = [start]
    for a, b in zip(signal, noise, strict=True):
        found.append(a**2 * found[-1] + b**2)
    return np.array(found)


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_data_are_sampled_each_example_by_its_own_key(name):
    """On a schedule that does not preserve variance; orders are in test_orders.py."""
    sampler, predict = build(name, 40), gaussian(FLOW, mean=0.3, std=0.5)
    traced = []

    @jax.jit
    def sample(keys):
        traced.append(keys)
        return base.sample(sampler, FLOW, predict, keys, (6,))

    keys = keys_lib.sample_keys(0, jnp.arange(1 << 12))
    x = sample(keys)
    assert x.shape == (1 << 12, 6) and x.dtype == jnp.float32
    # Standard errors are 0.003 and 0.002; first-order methods are some per cent off.
    assert float(x.mean()) == pytest.approx(0.3, abs=0.04)
    # Of a denoiser, whose answers are means and no samples, it makes less of a spread.
    std = 0.337 if name == "consistency" else 0.5
    assert float(x.std()) == pytest.approx(std, abs=0.04)
    assert len(np.unique(x, axis=0)) == len(x)
    others = keys_lib.sample_keys(1, jnp.arange(1 << 12)).at[3].set(keys[3])
    np.testing.assert_array_equal(sample(others)[3], x[3])
    # One program for a number of steps: no other key or value compiles it anew.
    assert len(traced) == 1


def test_a_sample_hardly_depends_on_the_size_of_its_batch():
    keys = keys_lib.sample_keys(0, jnp.arange(8))
    predict, sampler = gaussian(PROCESS, std=0.5), build("ddim", 5)
    sample = jax.jit(lambda keys: base.sample(sampler, PROCESS, predict, keys, (6,)))
    # Another batch size is another program, which may round differently.
    np.testing.assert_allclose(
        sample(keys[2:5]), sample(keys)[2:5], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_as_many_as_stated_and_begin_at_noise(name):
    """Without jit, a scan is a loop and a branch is taken or not."""
    seen = []

    def predict(z_t, t):
        seen.append(float(t))
        return Prediction(0.5 * z_t, 0.5 * z_t)

    sampler = build(name, 4)
    if sampler.num_evaluations is None:
        pytest.skip("adaptive: its steps follow from the data")
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.disable_jit():
        base.sample(sampler, PROCESS, predict, keys, (2,))
    derivatives = sampler.num_evaluations - len(seen)
    assert derivatives == DERIVATIVES.get(name, 0)
    assert seen[0] == 1.0 and min(seen) > 0.0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "schedule", ["shifted_cosine", "flow", "variance_exploding", "discrete_beta"]
)
def test_a_sampler_works_with_every_schedule_or_says_why_not(name, schedule):
    # The others are of one of these kinds: a shift, not preserving variance, a chain.
    sizes = {"shifted_cosine": {"resolution": 64, "reference": 32}}
    block = {"name": schedule, **sizes.get(schedule, {})}
    built = registry.build("schedule", block, "config.schedule")
    process = Gaussian(schedule=built, prediction="v")
    sampler = build(name, 4)
    try:
        if hasattr(sampler, "check"):
            sampler.check(process, DataSpec((2,)))
        sampler.times(built)
    except ValueError as error:
        assert ": " in str(error)
        return
    if sampler.num_evaluations is None:
        return  # its loop does not run without jit; one compilation each is too slow
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.disable_jit():
        x = base.sample(sampler, process, gaussian(process, std=0.5), keys, (2,))
    assert np.all(np.isfinite(x)) and np.abs(x).max() < 10


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_the_network_is_traced_once_and_sees_the_uniform_grid(name):
    traced, seen = [], []

    def predict(z_t, t):
        traced.append(t.shape)
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return Prediction(z_t, z_t)

    keys = jax.random.split(jax.random.key(0), 2)
    base.sample(build(name, 7), PROCESS, predict, keys, (1,)).block_until_ready()
    jax.effects_barrier()
    assert traced == [()]
    np.testing.assert_allclose(seen, np.arange(7, 0, -1) / 7, rtol=1e-7)


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_the_result_is_the_last_prediction_of_x(name):
    def predict(z_t, t):
        return Prediction(jnp.full_like(z_t, t), z_t)

    keys = jax.random.split(jax.random.key(0), 2)
    x = base.sample(build(name, 4), PROCESS, predict, keys, (3,))
    np.testing.assert_array_equal(x, 0.25)


@pytest.mark.parametrize("grid", ["quadratic", "logsnr", "rho"])
def test_a_sampler_walks_its_grid(grid):
    seen = []

    def predict(z_t, t):
        seen.append(float(t))
        return Prediction(z_t, z_t)

    block = {"name": "ddim", "num_steps": 6, "grid": {"name": grid}}
    sampler = registry.build("sampler", block, "config.sampler")
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.disable_jit():
        base.sample(sampler, PROCESS, predict, keys, (1,))
    np.testing.assert_array_equal(seen, sampler.times(PROCESS.schedule)[:-1])
    assert sampler.times(PROCESS.schedule)[1] != pytest.approx(5 / 6, abs=0.01)


def test_sampling_starts_at_the_noise_level_of_the_first_stop():
    """A grid may start below t = 1; the first latent has the variance it has there."""
    process = Gaussian(schedule=VarianceExploding(), prediction="x", sigma_data=0.5)
    first = []

    def predict(z_t, t):
        first.append((float(t), float(z_t.std())))
        return Prediction(z_t, z_t)

    sampler = Ddim(num_steps=2, grid=grids.Rho(sigma_max=2.0))
    keys = jax.random.split(jax.random.key(0), 64)
    with jax.disable_jit():
        base.sample(sampler, process, predict, keys, (256,))
    t, std = first[0]
    assert float(process.schedule.alpha_sigma(t)[1]) == pytest.approx(2.0, rel=1e-5)
    # 16,384 draws: a relative standard error of 0.0055.
    assert std == pytest.approx((2.0**2 + 0.5**2) ** 0.5, rel=0.02)


def test_ddim_with_full_eta_is_ancestral_sampling_without_exponent():
    ddim = coefficients(Ddim(num_steps=1, eta=1.0), PROCESS, mean=0.3, std=0.5)[8]
    ancestral = coefficients(NONE, PROCESS, mean=0.3, std=0.5)[8]
    # The last step ends at sigma = 5e-4; both sums are rounded at 1e-7.
    np.testing.assert_allclose(ddim, ancestral, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta: must be in \[0, 1\]"):
        Ddim(num_steps=1, eta=eta)


@pytest.mark.parametrize("num_steps", [1, 3, 10, 100])
def test_unit_gaussian_latents_keep_variance_one_at_exponent_one(num_steps):
    factor, scale = coefficients(FULL, PROCESS)[num_steps]
    # Each step is rounded at a few 6e-8 and the errors add up.
    tolerance = 3e-7 * num_steps**0.5 + 3e-7
    np.testing.assert_allclose(variances(factor, scale), 1.0, atol=tolerance)
    alpha, _ = PROCESS.schedule.alpha_sigma(UNIFORM(None, num_steps))
    np.testing.assert_allclose(factor, alpha[:-1] / alpha[1:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("num_steps", "truncated", "untruncated", "returned"),
    [
        (3, 0.354282, 0.354167, 0.749840),
        (10, 0.679265, 0.679121, 0.975391),
        (100, 0.954478, 0.954449, 0.999736),
    ],
)
def test_variance_of_unit_gaussian_data(num_steps, truncated, untruncated, returned):
    latent = variances(*coefficients(NONE, PROCESS)[num_steps])
    assert latent[-1] == pytest.approx(truncated, abs=2e-6)
    wide = variances(*coefficients(NONE, WIDE)[num_steps])
    assert wide[-1] == pytest.approx(untruncated, abs=2e-6)
    # The sample is x_hat = alpha z of the last latent before the last step.
    alpha = float(PROCESS.schedule.alpha_sigma(1.0 / num_steps)[0])
    assert alpha**2 * latent[-2] == pytest.approx(truncated, abs=2e-6)
    full = variances(*coefficients(FULL, PROCESS)[num_steps])
    assert alpha**2 * full[-2] == pytest.approx(returned, abs=4e-6)


@pytest.mark.parametrize(("exponent", "variance"), [(0.0, 0.354282), (1.0, 0.749840)])
def test_samples_have_the_variance_of_the_coefficients(exponent, variance):
    sampler = Ancestral(num_steps=3, noise_exponent=exponent)
    keys = jax.random.split(jax.random.key(0), 64)
    x = base.sample(sampler, PROCESS, gaussian(PROCESS), keys, (4096,))
    assert float(x.var()) == pytest.approx(variance, rel=5 * (2 / x.size) ** 0.5)


def test_point_mass_latents_have_the_variance_of_the_process():
    alpha, sigma = (
        np.float64(q) for q in PROCESS.schedule.alpha_sigma(UNIFORM(None, 10))
    )
    factor, addition = coefficients(NONE, PROCESS, mean=0.7, std=0.0)[10]
    # The latent has mean alpha 0.7; what is added beyond that is noise.
    scale = addition - 0.7 * (alpha[1:] - factor * alpha[:-1])
    found = variances(factor, scale, sigma[0] ** 2)
    np.testing.assert_allclose(found, sigma**2, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("num_steps", "expected"), [(2, 0.5), (8, 0.856232)])
def test_ddim_contracts_unit_gaussian_data_as_known(num_steps, expected):
    for process in (PROCESS, WIDE):
        factor, addition = coefficients(Ddim(num_steps=1), process)[num_steps]
        known = math.cos(process.schedule.span / num_steps) ** num_steps
        assert np.prod(factor) == pytest.approx(known, abs=1e-6)
        np.testing.assert_array_equal(addition, 0.0)
    assert known == pytest.approx(expected, abs=1e-6)


def test_ddim_is_deterministic_given_the_first_latent():
    keys = jax.random.split(jax.random.key(0), 2)
    state = Ddim(num_steps=2).init(jnp.ones((2, 3)), jnp.float32(1))
    t, s = jnp.float32(0.8), jnp.float32(0.4)
    first, second = (
        Ddim(num_steps=2).step(PROCESS, gaussian(PROCESS), state, t, s, k)
        for k in (keys, keys[::-1])
    )
    np.testing.assert_array_equal(first.z, second.z)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_steps_are_refused(name):
    with pytest.raises(ValueError, match="config.sampler.num_steps: .*got 0"):
        build(name, 0)


@pytest.mark.parametrize("exponent", [-0.1, 1.1])
def test_a_noise_exponent_outside_its_range_is_refused(exponent):
    with pytest.raises(ValueError, match="noise_exponent"):
        Ancestral(num_steps=1, noise_exponent=exponent)
