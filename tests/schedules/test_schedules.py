"""Claims about every registered schedule, and the numbers of the cosine family."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry, schedules
from diffusionlab.schedules.cosine import Cosine, InterpolatedCosine, ShiftedCosine
from diffusionlab.schedules.discrete_beta import DiscreteBeta
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.linear_beta import LinearBeta
from diffusionlab.schedules.linear_logsnr import LinearLogsnr
from diffusionlab.schedules.sigmoid import Sigmoid
from diffusionlab.schedules.variance_exploding import VarianceExploding

ARGUMENTS = {
    "shifted_cosine": {"resolution": 64, "reference": 32},
    "interpolated_cosine": {"resolution": 64, "low": 16, "high": 64},
}
BLOCKS = [
    *(
        {"name": name, **ARGUMENTS.get(name, {})}
        for name in schedules.REGISTRY["schedule"]
        # Of tokens: discrete/test_alpha.py.
        if not name.startswith("alpha_")
    ),
    {"name": "edm", "preserving": False},
    {"name": "discrete_beta", "spacing": "scaled_linear", "num_timesteps": 77},
    {"name": "sigmoid", "start": 0.0, "temperature": 0.1},
]
T = jnp.linspace(0.0, 1.0, 4097)
ENDS = jnp.array([0.0, 1.0])


@pytest.fixture(params=BLOCKS, ids=lambda block: "-".join(map(str, block.values())))
def schedule(request):
    return registry.build("schedule", request.param, "config.schedule")


def test_logsnr_is_strictly_decreasing_and_its_derivative_negative(schedule):
    assert np.all(np.diff(schedule.logsnr(T)) < 0)
    assert np.all(schedule.derivative(T) < 0)


def test_derivative_is_the_automatic_one(schedule):
    logsnr, tangent = jax.jvp(schedule.logsnr, (T,), (jnp.ones_like(T),))
    # Two float32 formulas of about five operations each.
    np.testing.assert_allclose(schedule.derivative(T), tangent, rtol=2e-6)


def test_inverse_is_a_round_trip_under_jit(schedule):
    t = jax.jit(lambda t: schedule.inverse(schedule.logsnr(t)))(T)
    # logsnr is rounded at 15 * 6e-8, and divided by a slope of 5 or more; t at 6e-8.
    np.testing.assert_allclose(t, T, rtol=0, atol=4e-7)


def test_inverse_stays_in_the_unit_interval(schedule):
    t = schedule.inverse(jnp.array([60.0, -60.0]))
    np.testing.assert_allclose(t, ENDS, atol=1e-7)


def test_ends_are_finite_and_their_scales_agree_with_logsnr(schedule):
    alpha, sigma = schedule.alpha_sigma(T)
    logsnr = schedule.logsnr(T)
    assert np.all(np.isfinite(logsnr))
    assert np.all(np.isfinite(schedule.derivative(ENDS)))
    assert np.all(np.asarray(alpha) > 0) and np.all(np.asarray(sigma) > 0)
    np.testing.assert_allclose(2 * jnp.log(alpha / sigma), logsnr, rtol=0, atol=4e-6)


def test_bfloat16_times_are_computed_in_float32(schedule):
    t = T.astype(jnp.bfloat16)
    for function in (schedule.logsnr, schedule.derivative):
        assert function(t).dtype == jnp.float32
        np.testing.assert_array_equal(function(t), function(t.astype(jnp.float32)))
    assert schedule.alpha_sigma(t)[0].dtype == jnp.float32


def test_scales_preserve_variance_but_those_that_say_otherwise(schedule):
    alpha, sigma = schedule.alpha_sigma(T)
    if isinstance(schedule, VarianceExploding) or not getattr(
        schedule, "preserving", True
    ):
        np.testing.assert_array_equal(alpha, 1.0)
        return
    total = alpha + sigma if isinstance(schedule, Flow) else alpha**2 + sigma**2
    np.testing.assert_allclose(total, 1.0, atol=4e-7)


def test_scales_have_the_derivatives_that_logsnr_has(schedule):
    # Processes differentiate them forwards; 2 (alpha'/alpha - sigma'/sigma) = logsnr'.
    t = T[1:-1]
    (alpha, sigma), (d_alpha, d_sigma) = jax.jit(
        lambda t: jax.jvp(schedule.alpha_sigma, (t,), (jnp.ones_like(t),))
    )(t)
    slope = 2 * (d_alpha / alpha - d_sigma / sigma)
    np.testing.assert_allclose(slope, schedule.derivative(t), rtol=1e-5)


def test_times_per_frame_keep_their_shape(schedule):
    t = jnp.full((2, 3), 0.3)
    for function in (schedule.logsnr, schedule.inverse, schedule.derivative):
        assert jax.eval_shape(function, t).shape == (2, 3)
    assert jax.eval_shape(schedule.alpha_sigma, t)[1].shape == (2, 3)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (Cosine(), (15.0, -15.0)),
        (Cosine(logsnr_min=-40.0, logsnr_max=30.0), (30.0, -40.0)),
        (LinearLogsnr(), (15.0, -15.0)),
        (Flow(), (20.0, -20.0)),
        (Edm(), (-2 * math.log(0.002), -2 * math.log(80))),
        (Edm(preserving=False), (-2 * math.log(0.002), -2 * math.log(80))),
        (VarianceExploding(), (-2 * math.log(0.01), -2 * math.log(50))),
        (Sigmoid(), (15.0, -15.0)),
        (Sigmoid(start=0.0, temperature=0.3, logsnr_max=9.0), (9.0, -15.0)),
        (
            DiscreteBeta(num_timesteps=2),
            (math.log(9999), math.log(0.979902 / 0.020098)),
        ),
        (
            LinearBeta(),
            (-math.log(math.expm1(1e-4 + 9.95e-6)), -math.log(math.expm1(10.05))),
        ),
        (
            ShiftedCosine(resolution=256, reference=32),
            (15 - 4.158883083, -15 - 4.158883083),
        ),
        (ShiftedCosine(resolution=256, reference=32, keep_range=True), (15.0, -15.0)),
        (
            InterpolatedCosine(resolution=512, low=32, high=256),
            (15 + 2 * math.log(256 / 512), -15 + 2 * math.log(32 / 512)),
        ),
        (
            InterpolatedCosine(resolution=512, low=32, high=256, noisy_end="high"),
            (15 + 2 * math.log(32 / 512), -15 + 2 * math.log(256 / 512)),
        ),
    ],
)
def test_ends_have_the_values_asked_for(schedule, ends):
    np.testing.assert_allclose(schedule.logsnr(ENDS), ends, rtol=2e-7, atol=1e-6)


def test_cosine_is_zero_in_the_middle_and_has_the_published_slope():
    t = np.linspace(0.05, 0.95, 19)
    span = math.atan(math.exp(7.5)) - math.atan(math.exp(-7.5))
    theta = math.atan(math.exp(-7.5)) + t * span
    assert abs(float(Cosine().logsnr(0.5))) < 1e-6
    np.testing.assert_allclose(
        Cosine().derivative(t), -4 * span / np.sin(2 * theta), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("resolution", "reference", "shift"),
    [
        (128, 32, -2.7726),
        (256, 64, -2.7726),
        (512, 32, -5.5452),
        (512, 256, -1.3863),
        (128, 256, 1.3863),
        (256, 32, -4.1589),
    ],
)
def test_shift_is_the_published_table(resolution, reference, shift):
    schedule = ShiftedCosine(resolution=resolution, reference=reference)
    assert schedule.shift == pytest.approx(shift, abs=5e-5)
    np.testing.assert_allclose(
        schedule.logsnr(T), Cosine().logsnr(T) + shift, atol=5.2e-5
    )


def test_shift_to_the_own_resolution_is_the_identity():
    schedule = ShiftedCosine(resolution=64, reference=64)
    np.testing.assert_array_equal(schedule.logsnr(T), Cosine().logsnr(T))


@pytest.mark.parametrize("noisy_end", ["low", "high"])
def test_interpolation_between_equal_shifts_is_that_shift(noisy_end):
    both = InterpolatedCosine(resolution=512, low=64, high=64, noisy_end=noisy_end)
    np.testing.assert_array_equal(
        both.logsnr(T), ShiftedCosine(resolution=512, reference=64).logsnr(T)
    )


def test_interpolation_must_be_monotone():
    at_23 = InterpolatedCosine(resolution=512, low=1, high=23, noisy_end="high")
    assert at_23.max_slope == pytest.approx(-0.0078, abs=5e-5)
    assert float(at_23.derivative(0.5)) == pytest.approx(at_23.max_slope, abs=2e-6)
    with pytest.raises(ValueError, match=r"noisy_end.*0\.0773"):
        InterpolatedCosine(resolution=512, low=1, high=24, noisy_end="high")
    InterpolatedCosine(resolution=512, low=1, high=24)


@pytest.mark.parametrize("factor", [2, 4])
def test_pooling_multiplies_the_snr_by_the_square_of_the_factor(factor):
    # What is constant in each window survives pooling; the noise shrinks by the factor.
    side, pooled = 512, 512 // factor
    schedule = ShiftedCosine(resolution=side, reference=pooled)
    alpha, sigma = schedule.alpha_sigma(0.4)
    key_x, key_eps = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (pooled, pooled))
    x = jnp.repeat(jnp.repeat(x, factor, 0), factor, 1)
    eps = jax.random.normal(key_eps, (side, side))

    def power(q):
        q = q.reshape(pooled, factor, pooled, factor).mean((1, 3))
        return float((q**2).mean())

    snr = power(alpha * x) / power(sigma * eps)
    # Five standard errors of a ratio of two variances over pooled² values.
    tolerance = 5 * 2 / pooled
    assert snr == pytest.approx(math.exp(Cosine().logsnr(0.4)), rel=tolerance)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Cosine(logsnr_min=1.0, logsnr_max=1.0),
        lambda: LinearLogsnr(logsnr_min=2.0, logsnr_max=1.0),
        lambda: Flow(logsnr_min=2.0, logsnr_max=1.0),
        lambda: ShiftedCosine(resolution=0, reference=1),
        lambda: InterpolatedCosine(resolution=8, low=4, high=8, noisy_end="left"),
        lambda: LinearBeta(beta_min=3.0, beta_max=2.0),
        lambda: LinearBeta(time_min=0.0),
        lambda: Edm(sigma_min=0.0),
        lambda: Edm(rho=0.0),
        lambda: VarianceExploding(sigma_max=0.01),
        lambda: Sigmoid(start=3.0),
        lambda: Sigmoid(temperature=0.0),
        lambda: Sigmoid(logsnr_min=15.0),
        lambda: DiscreteBeta(num_timesteps=1),
        lambda: DiscreteBeta(beta_start=0.03),
        lambda: DiscreteBeta(spacing="squared"),
    ],
)
def test_impossible_constants_are_refused(build):
    with pytest.raises(ValueError, match="^[a-z_]+: "):
        build()


@pytest.mark.parametrize("name", ["variance_exploding", "edm"])
def test_exploding_noise_levels_are_the_published_ones(name):
    t = np.linspace(0, 1, 9)
    if name == "edm":
        roots = 0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))
        schedule, expected = Edm(preserving=False), roots**7
    else:
        schedule, expected = VarianceExploding(), 0.01 * 5000**t
    np.testing.assert_allclose(schedule.alpha_sigma(t)[1], expected, rtol=4e-6)


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (DiscreteBeta(), np.linspace(1e-4, 0.02, 1000)),
        (
            DiscreteBeta(beta_start=0.00085, beta_end=0.012, spacing="scaled_linear"),
            np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        ),
    ],
)
def test_discrete_beta_is_the_chain_at_its_steps(schedule, betas):
    square = np.cumprod(1 - betas)
    t = jnp.arange(1000) / 999
    alpha, sigma = schedule.alpha_sigma(t)
    # logsnr is rounded at 10 * 6e-8, and lies between steps by 1000 * 6e-8 of a slope
    # of 0.02 or, at the first, 0.8.
    np.testing.assert_allclose(alpha**2, square, rtol=4e-6)
    np.testing.assert_allclose(sigma**2, 1 - square, rtol=4e-6)
    # The last step of DDPM has alpha² = 4.0e-5, that of Stable Diffusion 0.00466.
    expected = 4.04e-5 if schedule.spacing == "linear" else 4.66e-3
    assert square[-1] == pytest.approx(expected, rel=2e-3)
    middle = 0.5 * (schedule.logsnr(t[:-1]) + schedule.logsnr(t[1:]))
    halves = schedule.logsnr(0.5 * (t[:-1] + t[1:]))
    np.testing.assert_allclose(halves, middle, atol=1e-4)


def test_discrete_beta_approaches_the_continuous_diffusion():
    t = jnp.linspace(0.1, 1.0, 64)
    chain, limit = DiscreteBeta().logsnr(t), LinearBeta().logsnr(t)
    # beta_k = 1e-4 ... 0.02 is beta(t) / 1000; the chain is of first order in 1/1000.
    np.testing.assert_allclose(chain, limit, atol=0.08)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sigmoid_is_the_published_formula(temperature):
    schedule = Sigmoid(
        start=-3.0, end=4.0, temperature=temperature, logsnr_min=-25.0, logsnr_max=25.0
    )
    t = np.linspace(0, 1, 4096)[1:-1]

    def logistic(q):
        return 1 / (1 + np.exp(-q / temperature))

    low, high = logistic(-3.0), logistic(4.0)
    # tau of equation 1 from alpha², in float64.
    square = 1 / (1 + np.exp(-np.float64(schedule.logsnr(t))))
    level = high - square * (high - low)
    tau = (temperature * np.log(level / (1 - level)) + 3) / 7
    # An affine function of t, from next to 0 to next to 1.
    fit = np.polyfit(t, tau, 1)
    np.testing.assert_allclose(tau, np.polyval(fit, t), atol=2e-6)
    np.testing.assert_allclose([fit[1], fit.sum()], [0.0, 1.0], atol=1e-6)


def test_gvp_of_sit_is_the_cosine():
    # alpha = cos(pi t / 2), sigma = sin(pi t / 2) without truncation.
    t = np.linspace(0, 1, 33)
    alpha, sigma = Cosine(logsnr_min=-30.0, logsnr_max=30.0).alpha_sigma(t)
    np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), atol=1e-6)
    np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), atol=1e-6)


def test_every_step_of_a_chain_is_in_the_interval_after_it():
    """However its time was rounded: as k / (K - 1), or as a sampler's 1 - i / N."""
    chain = DiscreteBeta()
    k = np.arange(999)
    for t in (np.float32(k / 999), np.float32(1) - np.float32((999 - k) / 999)):
        slope = np.asarray(chain.derivative(jnp.asarray(t)))
        np.testing.assert_array_equal(slope, 999 * chain._tables[1][k])
