"""Claims about the gaussian process, for every schedule and every prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.linear_logsnr import LinearLogsnr
from diffusionlab.types import Prediction

SCHEDULES = {
    "cosine": {},
    "shifted_cosine": {"resolution": 64, "reference": 32},
    "interpolated_cosine": {"resolution": 64, "low": 16, "high": 64},
    "linear_beta": {},
    "linear_logsnr": {},
    "edm": {},
    "flow": {},
}
T = jnp.array([0.0, 0.02, 0.3, 0.5, 0.7, 0.98, 1.0])


@pytest.fixture(params=registry.table("schedule"))
def schedule(request):
    block = {"name": request.param, **SCHEDULES[request.param]}
    return registry.build("schedule", block, "config.schedule")


@pytest.fixture(params=PREDICTIONS)
def prediction(request):
    return request.param


def example(t, width=64, key=0):
    key_x, key_eps = jax.random.split(jax.random.key(key))
    shape = (*t.shape, width)
    return jax.random.normal(key_x, shape), jax.random.normal(key_eps, shape)


def test_a_perfect_answer_round_trips(schedule, prediction):
    process = Gaussian(schedule=schedule, prediction=prediction)
    x, eps = example(T)
    z_t = process.mix(x, eps, T)
    found = process.predict(process.target(x, eps, T), z_t, T)
    # z_t is rounded at about 4 * 6e-8; undoing it divides by alpha, or by sigma.
    alpha, sigma = (np.asarray(q)[:, None] for q in schedule.alpha_sigma(T))
    rounding = 4e-6
    assert np.all(np.abs(found.x - x) <= rounding / alpha)
    assert np.all(np.abs(found.eps - eps) <= rounding / sigma)


def test_a_prediction_explains_the_noisy_data(schedule, prediction):
    process = Gaussian(schedule=schedule, prediction=prediction)
    z_t, raw = example(T, key=1)
    found = process.predict(raw, z_t, T)
    size = 1 + np.abs(process.mix(jnp.abs(found.x), jnp.abs(found.eps), T))
    assert np.all(np.abs(process.mix(*found, T) - z_t) <= 2e-6 * size)


def test_eps_error_scale_turns_raw_errors_into_eps_errors(schedule, prediction):
    process = Gaussian(schedule=schedule, prediction=prediction)
    t = T.at[0].set(0.01).at[-1].set(0.99)
    z_t, raw = example(t, key=2)
    scale = np.sqrt(np.asarray(process.eps_error_scale(t)))[:, None]
    other = raw + 1.0 / scale  # an eps error of one
    error = process.predict(other, z_t, t).eps - process.predict(raw, z_t, t).eps
    sizes = np.abs(np.asarray(process.predict(other, z_t, t).eps)) + np.abs(raw) * scale
    assert np.all(np.abs(np.abs(error) - 1.0) <= 4e-6 * (1 + sizes))


def test_error_identities_hold_where_variance_is_preserved():
    schedule = LinearLogsnr(logsnr_min=-8.0, logsnr_max=8.0)
    logsnr = schedule.logsnr(T)
    scale = {
        name: Gaussian(schedule=schedule, prediction=name).eps_error_scale(T)
        for name in PREDICTIONS
    }
    np.testing.assert_allclose(scale["x"], jnp.exp(logsnr), rtol=4e-6)
    np.testing.assert_allclose(scale["v"], jax.nn.sigmoid(logsnr), rtol=4e-6)
    np.testing.assert_allclose(scale["x"] / scale["v"], 1 + jnp.exp(logsnr), rtol=4e-6)


def test_flow_velocity_is_eps_minus_x():
    schedule = Flow()
    process = Gaussian(schedule=schedule, prediction="velocity")
    x, eps = example(T)
    span = 1 - 2 / (1 + np.exp(10.0))
    np.testing.assert_allclose(
        process.target(x, eps, T), span * (eps - x), rtol=1e-5, atol=1e-6
    )


def test_cosine_velocity_is_proportional_to_v():
    schedule = Cosine()
    x, eps = example(T)
    v = Gaussian(schedule=schedule, prediction="v").target(x, eps, T)
    velocity = Gaussian(schedule=schedule, prediction="velocity").target(x, eps, T)
    # alpha = cos theta and sigma = sin theta, so both are the derivative in theta.
    np.testing.assert_allclose(velocity, schedule.span * v, rtol=1e-5, atol=1e-5)


def test_both_ends_are_finite_in_bfloat16_and_results_are_float32(schedule, prediction):
    process = Gaussian(schedule=schedule, prediction=prediction)
    t = jnp.array([0.0, 1.0], jnp.bfloat16)
    x, raw = (q.astype(jnp.bfloat16) for q in example(t))
    z_t, eps = process.corrupt(jax.random.key(0), x, t)
    found = process.predict(raw, z_t.astype(jnp.bfloat16), t)
    scale = process.eps_error_scale(t)
    for array in (z_t, eps, *found, process.target(x, eps, t), scale):
        assert array.dtype == jnp.float32 and np.all(np.isfinite(array))
    mean, variance = process.posterior(found, z_t, jnp.float32(1), jnp.float32(0))
    assert mean.dtype == variance.dtype == jnp.float32 and np.all(np.isfinite(mean))


def test_posterior_is_the_textbook_one(schedule):
    process = Gaussian(schedule=schedule, prediction="x")
    s = jnp.array([0.0, 0.0, 0.05, 0.3, 0.4, 0.55, 0.8])
    t = jnp.array([0.1, 1.0, 0.2, 0.35, 0.6, 0.9, 1.0])
    x, z_t = example(t)
    alpha_t, sigma_t = (np.float64(q) for q in schedule.alpha_sigma(t))
    alpha_s, sigma_s = (np.float64(q) for q in schedule.alpha_sigma(s))
    ratio = alpha_t / alpha_s
    between = sigma_t**2 - ratio**2 * sigma_s**2
    mean = (ratio * sigma_s**2 / sigma_t**2)[:, None] * np.float64(z_t)
    mean += (alpha_s * between / sigma_t**2)[:, None] * np.float64(x)
    expected = {
        0.0: between * sigma_s**2 / sigma_t**2,
        1.0: between,
        0.3: between * (sigma_s**2 / sigma_t**2) ** 0.7,
    }
    for exponent, variance in expected.items():
        found = process.posterior(Prediction(x, x), z_t, t, s, exponent)
        np.testing.assert_allclose(found[0], mean, rtol=2e-5, atol=4e-6)
        np.testing.assert_allclose(found[1][:, 0], variance, rtol=2e-5)


def test_prior_is_a_function_of_each_key(schedule):
    process = Gaussian(schedule=schedule, prediction="v")
    keys = jax.random.split(jax.random.key(0), 3)
    z = process.prior_from(keys, (1000,))
    np.testing.assert_array_equal(z[1], process.prior(keys[1], (1000,)))
    # Five standard errors of a variance over 3000 values.
    assert float(z.var()) == pytest.approx(1.0, abs=5 * (2 / 3000) ** 0.5)


def test_a_time_per_frame_is_each_frame_at_its_time(prediction):
    process = Gaussian(schedule=Cosine(), prediction=prediction)
    t = jnp.array([[0.2, 0.9], [0.5, 0.1]])
    x, eps = example(t)
    raw = process.target(x, eps, t)
    predict = jax.jit(
        lambda x, eps, raw, t: process.predict(raw, process.mix(x, eps, t), t)
    )
    found = predict(x, eps, raw, t)
    alone = predict(x[0], eps[0], raw[0], t[0])
    np.testing.assert_allclose(found.x[0], alone.x, rtol=1e-6, atol=1e-6)


def test_a_scalar_time_is_the_same_time_for_all(prediction):
    process = Gaussian(schedule=Flow(), prediction=prediction)
    z_t, raw = example(T)
    scalar = jax.jit(process.predict)(raw, z_t, jnp.float32(0.4))
    vector = process.predict(raw, z_t, jnp.full_like(T, 0.4))
    np.testing.assert_allclose(scalar.x, vector.x, rtol=1e-6, atol=1e-6)


def test_an_unknown_prediction_names_the_known():
    with pytest.raises(ValueError, match="eps, v, velocity, x"):
        Gaussian(schedule=Cosine(), prediction="score")
