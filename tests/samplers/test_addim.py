"""aDDIM, and the variances that DDIM-like samplers leave, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import gaussian

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, grids
from diffusionlab.samplers.addim import Addim
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import Prediction

WIDE = Gaussian(schedule=Cosine(logsnr_min=-40.0, logsnr_max=40.0), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="v")
KEYS = jax.random.split(jax.random.key(0), 2)
# Entries +1 and -1: the mean square over one example is exactly 1, as in many
# dimensions, and stays equal over the entries, as every step is one factor.
SIGNS = jnp.tile(jnp.array([1.0, -1.0]), (2, 4))


@functools.cache
def program(sampler):
    @jax.jit
    def solve(variance, times):
        predict = gaussian(WIDE, std=jnp.sqrt(variance))
        state = base.solve(sampler, WIDE, predict, SIGNS, times, KEYS)
        return jnp.mean(sampler.final(state) ** 2) / variance

    return solve


def ratio(sampler, num_steps, variance):
    """Variance of the result over that of the data, from z_1 ~ N(0, 1).

    Steps of no length, from t = 1 to 1, make the counts up to 64 one program.
    """
    times = grids.Uniform()(None, num_steps)
    times = np.concatenate([np.ones(max(0, 64 - num_steps), np.float32), times])
    return float(program(sampler)(variance, times))


def scales(process, *times):
    return np.float64(process.schedule.alpha_sigma(jnp.float32(times)))


@functools.cache
def single(sampler, process, variance):
    """One step `(z, t, s) -> (z_s, x)` of data N(0, variance)."""

    def step(z, t, s):
        state = sampler.init(z, t)
        return sampler.step(
            process, gaussian(process, std=jnp.sqrt(variance)), state, t, s, KEYS
        )

    return jax.jit(step)


@pytest.mark.parametrize(
    ("num_steps", "unit", "quarter", "four"),
    [
        (1, 0.05, 0.2, 0.0125),
        (2, 0.4829, 0.6007, 0.2512),
        (4, 0.7547, 0.8457, 0.5624),
        (8, 0.9079, 0.9653, 0.7831),
        (16, 0.9862, 1.0233, 0.9083),
        (32, 1.0194, 1.0469, 0.9711),
    ],
)
def test_the_variance_with_the_analytic_rule(num_steps, unit, quarter, four):
    for variance, expected in ((1.0, unit), (0.25, quarter), (4.0, four)):
        # Four printed digits; rounding in float32 adds 1e-6.
        found = ratio(Addim(num_steps=1), num_steps, variance)
        assert found == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("share", "variance", "known"),
    [
        (1.0, 1.0, {2: 2.0, 4: 2.0736, 8: 1.8990, 16: 1.6912, 64: 1.3711}),
        (0.75, 1.0, {2: 1.6226, 4: 1.7441, 8: 1.6529, 16: 1.5175, 64: 1.2881}),
        (0.75, 0.25, {4: 0.4397, 8: 0.4365, 16: 0.4087, 64: 0.3453}),
        (None, 1.0, {64: 1.0292}),
        (None, 0.25, {4: 0.2114, 8: 0.2413, 16: 0.2558, 64: 0.2626}),
    ],
)
def test_the_full_posterior_variance_overshoots(share, variance, known):
    # c sigma² / (alpha² c + sigma²) = 1 / (1 / c + SNR) is the posterior variance.
    rule = {} if share is None else {"numerator": share, "offset": 1.0 / variance}
    for num_steps, expected in known.items():
        found = variance * ratio(Addim(num_steps=1, **rule), num_steps, variance)
        assert found == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("share", "known"), [(0.75, 1.069), (None, None)])
def test_the_variance_tends_to_that_of_the_data(share, known):
    rule = {} if share is None else {"numerator": share, "offset": 1.0}
    numbers = (64, 256, 1280)
    found = [ratio(Addim(num_steps=1, **rule), number, 1.0) for number in numbers]
    excess = np.array(found) - 1
    assert np.all(excess > 0) and np.all(excess[1:] < 0.9 * excess[:-1])
    if known is not None:
        assert found[-1] == pytest.approx(known, abs=6e-4)


@pytest.mark.parametrize(
    ("num_steps", "unit", "quarter"),
    [
        (1, 0.0, 0.0),
        (2, 0.25, 0.16),
        (4, 0.53079, 0.4447),
        (8, 0.73313, 0.6769),
        (16, 0.85688, 0.8242),
        (32, 0.92576, 0.9081),
        (64, 0.96218, None),
        (1280, 0.99807, None),
    ],
)
def test_the_variance_that_ddim_loses(num_steps, unit, quarter):
    sampler = Ddim(num_steps=1)
    found = ratio(sampler, num_steps, 1.0)
    # 1280 steps are rounded 1280 times, by 1e-7 or less.
    assert found == pytest.approx(unit, abs=3e-5)
    known = np.cos(np.pi / (2 * num_steps)) ** (2 * num_steps)
    assert found == pytest.approx(known, abs=3e-6 + 4e-8 * num_steps)
    if quarter is not None:
        for variance in (0.25, 4.0):
            assert ratio(sampler, num_steps, variance) == pytest.approx(
                quarter, abs=6e-5
            )


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(1, 0.0), (2, 0.25), (4, 0.4357), (8, 0.6258), (16, 0.7741), (32, 0.8724)],
)
def test_the_variance_that_ancestral_sampling_leaves(num_steps, expected):
    """The recursion of mean and variance of the step itself."""
    sampler = Ancestral(num_steps=num_steps, noise_exponent=0.0)
    times = sampler.times(WIDE.schedule)

    @jax.jit
    def step(t, s):
        one = jnp.ones_like(t)
        prediction = gaussian(WIDE)(one, t)
        mean, added = WIDE.posterior(prediction, one, t, s, sampler.noise_exponent)
        return prediction.x, mean, added

    x, mean, added = step(times[:-1], times[1:])
    variance = 1.0
    for factor, noise in zip(np.float64(mean)[:-1], np.float64(added), strict=False):
        variance = factor**2 * variance + noise
    assert float(x[-1]) ** 2 * variance == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("process", [WIDE, FLOW])
def test_ddim_and_its_inverse_are_the_identity(process):
    t = jnp.array([0.9, 0.7, 0.5, 0.3, 0.4, 1.0])
    s = jnp.array([0.2, 0.4, 0.1, 0.0, 0.0, 0.5])
    z, x = jax.random.normal(jax.random.key(1), (2, 6))
    alpha_t, sigma_t = process.schedule.alpha_sigma(t)
    _, sigma_s = process.schedule.alpha_sigma(s)
    z_s = process.mix(x, (z - alpha_t * x) / sigma_t, s)
    kappa = base.ddim_weight(process, t, s)
    np.testing.assert_allclose((z_s - sigma_s / sigma_t * z) / kappa, x, atol=1e-5)


@pytest.mark.parametrize("process", [WIDE, FLOW])
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_a_ddim_step_loses_kappa_squared_of_the_posterior_variance(process, variance):
    for t, s in ((0.5, 0.25), (0.9, 0.2), (0.3, 0.1)):
        (a_t, a_s), (s_t, s_s) = scales(process, t, s)
        v_t, v_s = a_t**2 * variance + s_t**2, a_s**2 * variance + s_s**2
        z_s, _ = single(Ddim(num_steps=1), process, variance)(SIGNS, t, s)
        factor = float(z_s[0, 0])
        assert factor == pytest.approx((a_s * a_t * variance + s_s * s_t) / v_t)
        kappa = float(base.ddim_weight(process, jnp.float32(t), jnp.float32(s)))
        lost = kappa**2 * variance * s_t**2 / v_t
        assert v_s - factor**2 * v_t == pytest.approx(lost, rel=1e-4)


def test_the_added_norm_is_exact_where_x_and_eps_are_orthogonal():
    x, eps = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    axes = (1, 2)
    share = (x * eps).sum(axes, keepdims=True) / (eps**2).sum(axes, keepdims=True)
    x = jnp.asarray(x - share * eps)
    t, s = jnp.float32(0.5), jnp.float32(0.25)

    def z_s(sampler):
        state = sampler.init(jnp.zeros_like(x), t)
        return sampler.step(WIDE, lambda *_: Prediction(x, eps), state, t, s, KEYS).z

    kappa = float(base.ddim_weight(WIDE, t, s))
    assert kappa == pytest.approx(0.541196, abs=1e-6)
    assert kappa**2 == pytest.approx(0.292893, abs=1e-6)
    adaptive = z_s(Addim(num_steps=1, posterior_variance=0.3))
    added = np.sum(np.float64(adaptive) ** 2 - np.float64(z_s(Ddim(num_steps=1))) ** 2)
    each = np.sum(np.float64(adaptive) ** 2, axes)
    assert added == pytest.approx(2 * 12 * kappa**2 * 0.3, rel=1e-5)
    assert each[0] != pytest.approx(each[1], rel=0.1)


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_one_step_from_pure_noise_has_the_exact_variance(variance):
    sampler = Addim(num_steps=1, posterior_variance=variance)
    for s in (0.9, 0.5, 0.1, 0.0):
        z_s, x = single(sampler, WIDE, variance)(SIGNS, 1.0, s)
        alpha, sigma = scales(WIDE, s)
        expected = (alpha**2 * variance + sigma**2).item()
        assert float(jnp.mean(z_s**2)) == pytest.approx(expected, rel=1e-5)
    assert float(jnp.mean(x**2)) == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("process", [WIDE, FLOW])
def test_a_step_is_the_published_one(process):
    z = (
        jax.random.normal(jax.random.key(2), (2, 3, 5))
        * jnp.array([1, 9])[:, None, None]
    )
    for t, s in ((0.9, 0.5), (0.3, 0.2)):
        (a_t, a_s), (s_t, s_s) = scales(process, t, s)
        x = np.float64(gaussian(process, std=0.5)(z, t).x)
        e = (np.float64(z) - a_t * x) / s_t
        mean = (e**2).mean((1, 2), keepdims=True)
        lost = (a_s - a_t * s_s / s_t) ** 2 * 0.1 / (2 + a_t**2 / s_t**2)
        expected = a_s * x + np.sqrt(s_s**2 + lost / mean) * e
        z_s, _ = single(Addim(num_steps=1), process, 0.25)(z, t, s)
        np.testing.assert_allclose(z_s, expected, rtol=2e-5, atol=2e-5)


def test_without_a_variance_it_is_ddim():
    z = jax.random.normal(jax.random.key(2), (2, 4))
    for sampler in (
        Addim(num_steps=1, numerator=0.0),
        Addim(num_steps=1, posterior_variance=0.0),
    ):
        found = single(sampler, FLOW, 0.25)(z, 0.7, 0.4)
        expected = single(Ddim(num_steps=1), FLOW, 0.25)(z, 0.7, 0.4)
        np.testing.assert_allclose(found.z, expected.z, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found.x, expected.x)


def test_a_prediction_without_noise_stays_finite():
    sampler = Addim(num_steps=1)
    state = sampler.init(SIGNS, jnp.float32(1))
    answer = Prediction(SIGNS, 0.0 * SIGNS)
    for s in (0.5, 0.0):
        t, s = jnp.float32(0.9), jnp.float32(s)
        state = sampler.step(WIDE, lambda *_: answer, state, t, s, KEYS)
        assert np.all(np.isfinite(state.z))
        np.testing.assert_array_equal(state.x, SIGNS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("numerator", -0.1), ("offset", 0), ("posterior_variance", -1)],
)
def test_a_field_out_of_range_is_refused(field, value):
    block = {"name": "addim", "num_steps": 2} | {field: value}
    with pytest.raises(ValueError, match=f"config.sampler.{field}: .*got {value}"):
        registry.build("sampler", block, "config.sampler")
