"""Claims about the gaussian process, for every schedule and every prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.linear_logsnr import LinearLogsnr
from diffusionlab.types import Prediction

SCHEDULES = {
    "cosine": {},
    "shifted_cosine": {"resolution": 64, "reference": 32},
    "interpolated_cosine": {"resolution": 64, "low": 16, "high": 64},
    "linear_beta": {},
    "linear_logsnr": {},
    "edm": {"preserving": False},
    "flow": {},
    "discrete_beta": {},
    "sigmoid": {},
    "variance_exploding": {},
}
T = jnp.array([0.0, 0.02, 0.3, 0.5, 0.7, 0.98, 1.0])


@pytest.fixture(params=[n for n in registry.table("schedule") if "alpha_" not in n])
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
    # z_t is rounded at about 4 * 6e-8 of its size; undoing it divides by alpha, or by
    # sigma.
    alpha, sigma = (np.asarray(q)[:, None] for q in schedule.alpha_sigma(T))
    rounding = 4e-6 * np.hypot(alpha, sigma)
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
    # Of N(0, I) data: the variance of z_s less what z_t explains of it.
    q_t, q_s = alpha_t**2 + sigma_t**2, alpha_s**2 + sigma_s**2
    low, high = between * sigma_s**2 / sigma_t**2, q_s * between / q_t
    expected = {0.0: low, 1.0: high, 0.3: low**0.7 * high**0.3}
    if isinstance(schedule, LinearLogsnr):
        np.testing.assert_allclose(high, between, rtol=1e-6)
    for exponent, variance in expected.items():
        found = process.posterior(Prediction(x, x), z_t, t, s, exponent)
        np.testing.assert_allclose(found[0], mean, rtol=2e-5, atol=4e-6)
        np.testing.assert_allclose(found[1][:, 0], variance, rtol=2e-5)


def test_prior_is_a_function_of_each_key(schedule):
    process = Gaussian(schedule=schedule, prediction="v")
    keys = jax.random.split(jax.random.key(0), 3)
    z = process.prior_from(keys, (1000,))
    np.testing.assert_array_equal(z[1], process.prior(keys[1], (1000,)))
    alpha, sigma = schedule.alpha_sigma(1.0)
    # Five standard errors of a variance over 3000 values.
    expected = float(alpha**2 + sigma**2)
    assert float(z.var()) == pytest.approx(expected, rel=5 * (2 / 3000) ** 0.5)


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


EDM_D = 0.5


def test_edm_is_minus_v_for_unit_data_where_variance_is_preserved():
    x, eps = example(T)
    answers = {
        name: Gaussian(schedule=Cosine(), prediction=name).target(x, eps, T)
        for name in ("edm", "v")
    }
    np.testing.assert_allclose(answers["edm"], -answers["v"], rtol=1e-6, atol=2e-6)


def test_edm_has_the_published_preconditioning(schedule):
    """Table 1 of arXiv 2206.00364, in its variables z / alpha and sigma / alpha."""
    process = Gaussian(
        schedule=schedule, prediction="edm", sigma_data=EDM_D, scale_input=True
    )
    z_t, raw = example(T, key=3)
    alpha, sigma = (np.float64(q)[:, None] for q in schedule.alpha_sigma(T))
    z, level = np.float64(z_t) / alpha, sigma / alpha
    total = level**2 + EDM_D**2
    c_skip, c_out = EDM_D**2 / total, level * EDM_D / np.sqrt(total)
    # Each term is rounded a few times.
    x, size = c_skip * z + c_out * raw, np.abs(c_skip * z) + np.abs(c_out * raw)
    assert np.all(np.abs(process.predict(raw, z_t, T).x - x) <= 2e-6 * size)
    found = process.network_input(z_t, T)
    np.testing.assert_allclose(found, z / np.sqrt(total), rtol=2e-6)


def test_edm_sees_and_answers_in_unit_variance(schedule):
    """For data of variance d², by the coefficients of x / d and eps."""
    process = Gaussian(
        schedule=schedule, prediction="edm", sigma_data=EDM_D, scale_input=True
    )
    unit, zero = jnp.ones((T.size, 1)), jnp.zeros((T.size, 1))
    answer = [process.target(*pair, T) for pair in ((EDM_D * unit, zero), (zero, unit))]
    np.testing.assert_allclose(answer[0] ** 2 + answer[1] ** 2, 1.0, rtol=1e-6)
    seen = [
        process.network_input(process.mix(*pair, T), T)
        for pair in ((EDM_D * unit, zero), (zero, unit))
    ]
    np.testing.assert_allclose(seen[0] ** 2 + seen[1] ** 2, 1.0, rtol=1e-6)
    # And the two are uncorrelated: the skip connection leaves nothing linear to learn.
    overlap = answer[0] * seen[0] + answer[1] * seen[1]
    np.testing.assert_allclose(overlap, 0.0, atol=1e-6)


@pytest.mark.parametrize("scale_input", [True, False])
def test_only_scale_input_changes_what_the_network_sees(scale_input):
    process = Gaussian(schedule=Flow(), prediction="v", scale_input=scale_input)
    z_t, _ = example(T)
    same = np.array_equal(process.network_input(z_t, T), z_t)
    assert same == (not scale_input)


@pytest.mark.parametrize("std", [0.3, 2.0])
def test_exponent_one_reverses_gaussian_data_exactly(schedule, std):
    """From the marginal of z_t to that of z_s, in one step of any length."""
    process = Gaussian(schedule=schedule, prediction="x", sigma_data=std)
    t, s = jnp.array([1.0, 1.0, 0.7, 0.35]), jnp.array([0.0, 0.4, 0.2, 0.3])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(schedule.alpha_sigma, (t, s))
    q_t, q_s = (
        (a * std) ** 2 + b**2 for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s))
    )
    z_t = jnp.sqrt(q_t)[:, None]
    x = (alpha_t * std**2 / q_t)[:, None] * z_t
    mean, variance = process.posterior(Prediction(x, x), z_t, t, s, 1.0)
    np.testing.assert_allclose((mean**2 + variance)[:, 0], q_s, rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_posteriors_of_two_scalings_are_the_same_up_to_the_scale(exponent):
    t, s = jnp.array([1.0, 0.7, 0.35]), jnp.array([0.4, 0.0, 0.3])
    found = []
    for preserving in (True, False):
        schedule = Edm(preserving=preserving)
        process = Gaussian(schedule=schedule, prediction="x", sigma_data=EDM_D)
        (alpha_t, _), (alpha_s, _) = map(schedule.alpha_sigma, (t, s))
        x, z = example(t)
        mean, variance = process.posterior(
            Prediction(x, x), alpha_t[:, None] * z, t, s, exponent
        )
        found.append((mean / alpha_s[:, None], variance[:, 0] / alpha_s**2))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


def test_sigma_data_must_be_positive():
    with pytest.raises(ValueError, match="^sigma_data: "):
        Gaussian(schedule=Cosine(), prediction="edm", sigma_data=0.0)


def test_an_unknown_prediction_names_the_known():
    with pytest.raises(ValueError, match="edm, eps, v, velocity, x"):
        Gaussian(schedule=Cosine(), prediction="score")
