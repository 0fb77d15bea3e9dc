"""Weightings against closed forms; expectations are quadratures, not random."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.objectives import weightings
from diffusionlab.objectives.denoising import denoising_error
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.schedules.cosine import Cosine, InterpolatedCosine, ShiftedCosine
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.linear_logsnr import LinearLogsnr
from diffusionlab.schedules.variance_exploding import VarianceExploding
from diffusionlab.types import lift

BIASES = {"sigmoid": {"bias": -2.0}, "sigmoid_uniform": {"bias": -2.0}}


@functools.cache
def legendre(num_nodes=200):
    """Nodes and weights on [0, 1], dense at the ends, where the cosine is steep."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return jnp.array((nodes + 1) / 2, jnp.float32), weights / 2


def expected_loss(schedule, weighting, denoise, x, eps, probability, prediction="v"):
    """E_t sum_j probability_j factor(t) |eps_j - eps_hat|² by quadrature over t."""
    process = Gaussian(schedule=schedule, prediction=prediction)
    t, weight = legendre()
    t = jnp.repeat(t, len(x))
    x, eps = (jnp.tile(q, len(weight))[:, None] for q in (x, eps))
    z_t = process.mix(x, eps, t)
    alpha, sigma = (lift(q, 2) for q in schedule.alpha_sigma(t))
    x_hat = denoise(z_t, alpha, sigma)
    raw = process.target(x_hat, (z_t - alpha * x_hat) / sigma, t)
    loss = weighting(schedule, t) * denoising_error(process, x, eps, raw, t)
    return float(weight @ np.float64(loss).reshape(len(weight), -1) @ probability)


def gaussian_loss(schedule, weighting, std=1.0, **kwargs):
    # Two nodes per variable integrate a squared linear error exactly.
    x = std * jnp.array([1.0, 1.0, -1.0, -1.0])
    eps = jnp.array([1.0, -1.0, 1.0, -1.0])

    def denoise(z_t, alpha, sigma):
        return alpha * std**2 * z_t / (alpha**2 * std**2 + sigma**2)

    return expected_loss(
        schedule, weighting, denoise, x, eps, np.full(4, 0.25), **kwargs
    )


def binary_loss(schedule, weighting, **kwargs):
    # By symmetry x = 1; the trapezoidal rule is exponentially accurate here.
    eps = np.linspace(-8, 8, 241)
    probability = np.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])

    def denoise(z_t, alpha, sigma):
        return jnp.tanh(alpha * z_t / sigma**2)

    eps = jnp.array(eps, jnp.float32)
    return expected_loss(
        schedule, weighting, denoise, jnp.ones_like(eps), eps, probability, **kwargs
    )


def shifted(factor):
    return ShiftedCosine(resolution=64, reference=int(64 * factor))


def range_formula(bias, logsnr_max, logsnr_min):
    """The sigmoid loss of unit gaussian data between two ends."""

    def antiderivative(logsnr):
        first = np.logaddexp(0, logsnr) - np.logaddexp(0, logsnr - bias)
        return first / (1 - math.exp(-bias)) / 2

    return antiderivative(logsnr_max) - antiderivative(logsnr_min)


@pytest.mark.parametrize("name", registry.table("weighting"))
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), VarianceExploding()])
def test_factors_are_positive_and_finite_at_both_ends(name, schedule):
    block = {"name": name, **BIASES.get(name, {})}
    weighting = registry.build("weighting", block, "config.weighting")
    factor = weighting(schedule, jnp.array([0.0, 0.5, 1.0], jnp.bfloat16))
    assert factor.dtype == jnp.float32 and factor.shape == (3,)
    assert np.all(np.asarray(factor) > 0) and np.all(np.isfinite(factor))


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), VarianceExploding()])
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_each_space_is_unweighted_under_its_own_weighting(name, schedule, std):
    """For data of any standard deviation, told to whom it concerns."""
    options = {"sigma_data": std} if name == "edm" else {}
    block = {"name": name, **options}
    weighting = registry.build("weighting", block, "config.weighting")
    process = Gaussian(schedule=schedule, prediction=name, sigma_data=std)
    t = jnp.linspace(0, 1, 33)
    factor = weighting(schedule, t) * process.eps_error_scale(t)
    # exp(logsnr) of a logsnr of 20 is accurate to 20 * 6e-8.
    np.testing.assert_allclose(factor, 1.0, rtol=5e-6)


X_FORMS = {
    # On the squared error of x, with s the noise level sigma / alpha of EDM.
    "edm": lambda s, snr: (s**2 + 1) / s**2,
    "edm-0.5": lambda s, snr: (s**2 + 0.25) / (s * 0.5) ** 2,
    "min_snr": lambda s, snr: np.minimum(snr, 5.0),
    "min_snr-1": lambda s, snr: np.minimum(snr, 1.0),
    "p2": lambda s, snr: snr / (1 + snr),
    "x": lambda s, snr: 1.0,
    "eps": lambda s, snr: snr,
}
OPTIONS = {"edm-0.5": {"sigma_data": 0.5}, "min_snr-1": {"gamma": 1.0}}


@pytest.mark.parametrize("name", X_FORMS)
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), VarianceExploding()])
def test_factors_on_the_error_of_x_are_the_published_ones(name, schedule):
    block = {"name": name.partition("-")[0], **OPTIONS.get(name, {})}
    weighting = registry.build("weighting", block, "config.weighting")
    t = jnp.linspace(0, 1, 33)
    alpha, sigma = (np.float64(q) for q in schedule.alpha_sigma(t))
    # |eps - eps_hat|² = SNR |x - x_hat|².
    snr = (alpha / sigma) ** 2
    expected = X_FORMS[name](sigma / alpha, snr) / snr
    np.testing.assert_allclose(weighting(schedule, t), expected, rtol=1e-5)


def test_p2_has_its_exponent_and_its_constant():
    schedule, t = LinearLogsnr(), jnp.linspace(0, 1, 33)
    snr = np.exp(np.float64(schedule.logsnr(t)))
    found = weightings.P2(gamma=0.5, k=3.0)(schedule, t)
    np.testing.assert_allclose(found, (3.0 + snr) ** -0.5, rtol=1e-5)
    np.testing.assert_array_equal(weightings.P2(gamma=0.0)(schedule, t), 1.0)


def test_min_snr_is_one_where_snr_is_below_gamma():
    schedule, t = LinearLogsnr(), jnp.linspace(0, 1, 33)
    clean = np.asarray(schedule.logsnr(t)) > math.log(5.0)
    factor = np.asarray(weightings.MinSnr()(schedule, t))
    assert np.all(factor[clean] < 1) and np.all(factor[~clean] == 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: weightings.Edm(sigma_data=0.0),
        lambda: weightings.MinSnr(gamma=0.0),
        lambda: weightings.P2(gamma=-1.0),
        lambda: weightings.P2(k=0.0),
    ],
)
def test_impossible_constants_are_refused(build):
    with pytest.raises(ValueError, match="^[a-z_]+: "):
        build()


def test_bias_has_no_default():
    with pytest.raises(ValueError, match="bias"):
        registry.check("weighting", {"name": "sigmoid"}, "config.weighting")


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_the_loss_is_the_same_in_three_spaces(bias):
    schedule = LinearLogsnr(logsnr_min=-10.0, logsnr_max=10.0)
    t = jnp.linspace(0, 1, 64)
    key = jax.random.split(jax.random.key(0), 3)
    x, eps, v_hat = (jax.random.normal(k, (64, 32)) for k in key)
    v_process = Gaussian(schedule=schedule, prediction="v")
    found = v_process.predict(v_hat, v_process.mix(x, eps, t), t)
    logsnr = np.float64(schedule.logsnr(t))
    sigmoid = 1 / (1 + np.exp(logsnr - bias))
    own_space = {
        "eps": sigmoid,
        "x": math.exp(bias) / (1 + np.exp(bias - logsnr)),
        "v": sigmoid / (1 + np.exp(-logsnr)),
    }
    reference = None
    for name, factor in own_space.items():
        process = Gaussian(schedule=schedule, prediction=name)
        raw = process.target(*found, t)
        loss = weightings.Sigmoid(bias=bias)(schedule, t) * denoising_error(
            process, x, eps, raw, t
        )
        raw_error = np.mean((process.target(x, eps, t) - raw) ** 2, axis=1)
        # Half of -logsnr' = 20.
        np.testing.assert_allclose(loss, 10 * factor * raw_error, rtol=1e-5)
        reference = loss if reference is None else reference
        # x - x_hat and eps - eps_hat are e^-5 at the ends, rounded at 1e-7 * few.
        np.testing.assert_allclose(loss, reference, rtol=4e-4)


def test_only_losses_with_the_slope_ignore_the_schedule():
    low = ShiftedCosine(resolution=64, reference=32).shift
    same_ends = [
        Cosine(),
        LinearLogsnr(),
        InterpolatedCosine(resolution=64, low=32, high=64, logsnr_min=-15.0 - low),
    ]
    for weighting in (weightings.Sigmoid(bias=-1.0), weightings.Elbo()):
        losses = [binary_loss(s, weighting) for s in same_ends]
        np.testing.assert_allclose(losses, losses[0], rtol=0, atol=2e-6)
    imitation = weightings.SigmoidUniform(bias=-1.0)
    losses = [binary_loss(s, imitation) for s in same_ends]
    assert np.ptp(losses) > 0.02


@pytest.mark.parametrize(
    ("bias", "expected"),
    [(-1, 0.290988), (-2, 0.156518), (-3, 0.078594), (1, 0.790988)],
)
def test_sigmoid_loss_of_unit_gaussian_data(bias, expected):
    assert range_formula(bias, 15.0, -15.0) == pytest.approx(expected, abs=1.5e-6)
    weighting = weightings.Sigmoid(bias=bias)
    for schedule in (Cosine(), shifted(0.25)):
        ends = [float(schedule.logsnr(t)) for t in (0.0, 1.0)]
        loss = gaussian_loss(schedule, weighting)
        assert loss == pytest.approx(range_formula(bias, *ends), abs=1e-6)


def test_sigmoid_loss_of_unit_gaussian_data_at_bias_zero():
    weighting = weightings.Sigmoid(bias=0.0)
    assert gaussian_loss(Cosine(), weighting) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (-3, 0.069623),
        (-2, 0.132828),
        (-1, 0.230725),
        (0, 0.356975),
        (3, 0.645649),
        (10, 0.693097),
    ],
)
def test_sigmoid_loss_of_binary_data(bias, expected):
    loss = binary_loss(Cosine(), weightings.Sigmoid(bias=bias))
    assert loss == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_elbo_of_binary_data_is_its_entropy(prediction):
    loss = binary_loss(Cosine(), weightings.Elbo(), prediction=prediction)
    # The noisy end at -15 leaves out e^-15 / 2 = 1.5e-7 nats.
    assert loss == pytest.approx(math.log(2), abs=2e-6)


def test_limits_of_the_bias():
    schedule = LinearLogsnr(logsnr_min=-10.0, logsnr_max=10.0)
    t = jnp.linspace(0, 1, 33)
    elbo = weightings.Elbo()(schedule, t)
    high = weightings.Sigmoid(bias=40.0)(schedule, t)
    np.testing.assert_allclose(high, elbo, rtol=1e-6)
    low = math.exp(40.0) * weightings.Sigmoid(bias=-40.0)(schedule, t)
    np.testing.assert_allclose(low, elbo * jnp.exp(-schedule.logsnr(t)), rtol=1e-5)


def test_the_imitation_is_the_sigmoid_without_half_the_slope():
    schedule, t = shifted(0.5), jnp.linspace(0, 1, 33)
    imitation = weightings.SigmoidUniform(bias=-1.0)(schedule, t)
    sigmoid = weightings.Sigmoid(bias=-1.0)(schedule, t)
    np.testing.assert_allclose(
        imitation, sigmoid * 2 / -schedule.derivative(t), rtol=1e-6
    )
    # -logsnr' is 4 span cosh((logsnr - shift) / 2) / 2 for the shifted cosine.
    sech = 1 / np.cosh((np.float64(schedule.logsnr(t)) - schedule.shift) / 2)
    product = -np.float64(schedule.derivative(t)) * sech
    np.testing.assert_allclose(product, 4 * Cosine().span, rtol=1e-5)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_smallest_eps_error_of_gaussian_data_at_each_noise_level(std):
    schedule, t = Cosine(logsnr_min=-8.0, logsnr_max=8.0), jnp.linspace(0, 1, 33)
    alpha, sigma = (np.float64(q)[:, None] for q in schedule.alpha_sigma(t))
    x, eps = std * np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
    z_t = alpha * x + sigma * eps
    eps_hat = sigma * z_t / ((alpha * std) ** 2 + sigma**2)
    expected = jax.nn.sigmoid(schedule.logsnr(t) + 2 * math.log(std))
    np.testing.assert_allclose(
        ((eps - eps_hat) ** 2).mean(1), expected, rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("weighting", [weightings.Elbo(), weightings.Edm()])
def test_the_scale_of_z_does_not_change_a_loss_of_logsnr(weighting):
    losses = [
        binary_loss(Edm(preserving=preserving), weighting)
        for preserving in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize(
    ("factor", "truncated"), [(1, 0.5), (0.5, 0.333216), (0.25, 0.199789)]
)
def test_eps_loss_of_unit_gaussian_data(factor, truncated):
    loss = gaussian_loss(shifted(factor), weightings.Eps())
    assert loss == pytest.approx(truncated, abs=1e-6)


@pytest.mark.parametrize(("factor", "std"), [(0.5, 1.0), (0.25, 2.0), (1, 0.3)])
def test_eps_loss_of_gaussian_data_without_truncation(factor, std):
    schedule = ShiftedCosine(
        resolution=64, reference=int(64 * factor), logsnr_min=-40.0, logsnr_max=40.0
    )
    loss = gaussian_loss(schedule, weightings.Eps(), std=std)
    expected = factor * std / (1 + factor * std)
    assert loss == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("factor", "truncated", "untruncated"),
    [
        (1, 0.189973, 0.189839),
        (0.5, 0.164134, 0.164018),
        (0.25, 0.112970, 0.112891),
    ],
)
def test_eps_loss_of_binary_data(factor, truncated, untruncated):
    loss = binary_loss(shifted(factor), weightings.Eps())
    assert loss == pytest.approx(truncated, abs=1e-6)
    wide = ShiftedCosine(
        resolution=64, reference=int(64 * factor), logsnr_min=-40.0, logsnr_max=40.0
    )
    assert binary_loss(wide, weightings.Eps()) == pytest.approx(untruncated, abs=1e-6)


def test_mmse_of_binary_data_at_snr_one():
    eps = np.linspace(-8, 8, 241)
    density = np.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi)
    mmse = np.sum((1 - np.tanh(1 + eps)) ** 2 * density) * (eps[1] - eps[0])
    assert mmse == pytest.approx(0.449600, abs=1e-6)
