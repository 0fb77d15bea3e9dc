"""Covariance-aware sampling where the exact answer is known."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from diffusionlab import registry
from diffusionlab.models import analytic, network
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, bases, covariance
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import DataSpec, Prediction

NUM_STEPS = (1, 2, 4, 8, 16, 32)
DATA = (0.25, 1.0, 4.0)
# As good as without truncation: alpha is 2e-9 at t = 1.
PROCESS = Gaussian(schedule=Cosine(logsnr_min=-40.0, logsnr_max=40.0), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="v")
EXPLODING = Gaussian(schedule=Edm(preserving=False), prediction="x")
SCALAR = bases.Oracle(num_products=1)
EXACT = functools.partial(covariance.Covariance, logsnr_reliable=-1e9)
KEYS = jax.random.split(jax.random.key(0), 4)


def build(**options):
    block = {"name": "covariance", "num_steps": 2, **options}
    return registry.build("sampler", block, "config.sampler")


def gaussian(process, variance):
    """The exact prediction for data N(0, variance)."""

    def predict(z_t, t):
        alpha, sigma = process.schedule.alpha_sigma(t)
        total = alpha**2 * variance + sigma**2
        return Prediction(alpha * variance / total * z_t, sigma / total * z_t)

    return predict


def mixture(process, means=(-1.0, 1.0), std=0.1, weights=(0.5, 0.5)):
    """The exact prediction for a mixture on the line."""
    known = (np.log(weights), np.array(means)[:, None], np.full((2, 1), std**2))
    known = tuple(q.astype(np.float32) for q in known)

    def predict(z_t, t):
        scales = process.schedule.alpha_sigma(t)
        found = analytic.denoise(z_t.reshape(-1, 1), *scales, *known)
        return Prediction(*(q.reshape(z_t.shape) for q in found))

    return predict


def ones(keys, shape):
    return jnp.ones((keys.shape[0], *shape))


@functools.cache
def coefficients(process, sampler):
    """z_s = a z + b noise, and the same of x, per step of every N, for each of DATA.

    Returns `{N: (a, b, a_x, b_x)}`, each float64 `[N, 3]`.
    """
    times = {n: np.arange(n, -1, -1, dtype=np.float32) / n for n in NUM_STEPS}

    def both(z, t, s, variance):
        predict = gaussian(process, variance)
        state = sampler.init(jnp.full((1, 1), z), t)
        state = sampler.step(process, predict, state, t, s, KEYS[:1])
        return jnp.stack([state.z[0, 0], state.x[0, 0]])

    with mock.patch.object(base, "normal", ones):
        step = jax.vmap(jax.vmap(both, (None, None, None, 0)), (None, 0, 0, None))
        t, s = (
            np.concatenate([q[part] for q in times.values()])
            for part in (np.s_[:-1], np.s_[1:])
        )
        step = jax.jit(step)
        noise, both = (step(z, t, s, jnp.float32(DATA)) for z in (0.0, 1.0))
    noise, factor = np.float64(noise), np.float64(both) - np.float64(noise)
    ends = np.cumsum(NUM_STEPS)[:-1]
    parts = zip(np.split(factor, ends), np.split(noise, ends), strict=True)
    return {
        n: (a[..., 0], b[..., 0], a[..., 1], b[..., 1])
        for n, (a, b) in zip(NUM_STEPS, parts, strict=True)
    }


def sampled_variance(process, sampler, num_steps):
    """Of the samples, for z_1 ~ N(0, 1), divided by that of the data; one per DATA."""
    a, b, a_x, b_x = coefficients(process, sampler)[num_steps]
    variance = np.ones(len(DATA))
    for i in range(num_steps - 1):
        variance = a[i] ** 2 * variance + b[i] ** 2
    return (a_x[-1] ** 2 * variance + b_x[-1] ** 2) / DATA


COVARIANCE = EXACT(num_steps=1, basis=SCALAR)
DDIM = EXACT(num_steps=1, basis=SCALAR, eta=0.0)


@pytest.mark.parametrize(
    ("num_steps", "unit", "other"),
    [
        (1, 0.0, 0.0),
        (2, 0.25, 0.16),
        (4, 0.5308, 0.4447),
        (8, 0.7331, 0.6769),
        (16, 0.8569, 0.8242),
        (32, 0.9258, 0.9081),
    ],
)
def test_gaussian_data_keep_their_variance_at_any_number_of_steps(
    num_steps, unit, other
):
    found = sampled_variance(PROCESS, COVARIANCE, num_steps)
    np.testing.assert_allclose(found, 1.0, rtol=2e-6 * num_steps**0.5)
    mean_only = sampled_variance(PROCESS, DDIM, num_steps)
    np.testing.assert_allclose(mean_only, [other, unit, other], atol=6e-5)
    known = math.cos(math.pi / (2 * num_steps)) ** (2 * num_steps)
    assert mean_only[1] == pytest.approx(known, abs=1e-6)


def test_the_default_is_ddim_at_the_first_step_unless_the_variances_are_known():
    """DDIM leaves out sin² of a variance 1, and every later step cos² of that."""
    plain = covariance.Covariance(num_steps=1, basis=bases.PixelIsotropic())
    known = dataclasses.replace(plain, data_variances=(1.0,))
    for num_steps in NUM_STEPS:
        angle = math.pi / (2 * num_steps)
        left_out = math.sin(angle) ** 2 * math.cos(angle) ** (2 * num_steps - 2)
        found = sampled_variance(PROCESS, plain, num_steps)[1]
        assert found == pytest.approx(1 - left_out, abs=1e-5)
        found = sampled_variance(PROCESS, known, num_steps)[1]
        assert found == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("process", [PROCESS, FLOW, EXPLODING])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_a_step_leads_from_one_marginal_to_the_next(process, num_steps):
    a, b, a_x, b_x = coefficients(process, COVARIANCE)[num_steps]
    t = np.arange(num_steps, -1, -1, dtype=np.float32)[:, None] / num_steps
    alpha, sigma = (np.float64(q) for q in process.schedule.alpha_sigma(t))
    total = alpha**2 * DATA + sigma**2
    np.testing.assert_allclose(a**2 * total[:-1] + b**2, total[1:], rtol=2e-5)
    # The sample has the variance of the data itself, not that of the last latent.
    last = a_x[-1] ** 2 * total[-2] + b_x[-1] ** 2
    np.testing.assert_allclose(last, DATA, rtol=2e-5)


def test_the_injected_variance_halves_when_the_steps_double():
    totals = []
    for n in NUM_STEPS:
        _, b, _, b_x = coefficients(PROCESS, COVARIANCE)[n]
        injected = np.append(b[:-1, 1], b_x[-1, 1]) ** 2
        np.testing.assert_allclose(injected, math.sin(math.pi / 2 / n) ** 2, rtol=1e-4)
        totals.append(injected.sum())
    # N sin²(pi / 2 N) is pi² / 4 N but for a part O(1 / N²) of it.
    assert totals[-2] / totals[-1] == pytest.approx(2, rel=0.005)
    assert totals[-1] == pytest.approx(math.pi**2 / 4 / 32, rel=0.001)


def test_the_first_step_is_finite_where_alpha_vanishes():
    # sigma² / alpha overflows float32 below alpha = 3e-39; 1e-26 here squares to 0.
    process = Gaussian(
        schedule=Cosine(logsnr_min=-120.0, logsnr_max=40.0), prediction="v"
    )
    a, b, a_x, b_x = coefficients(process, COVARIANCE)[1]
    np.testing.assert_allclose(b_x[0] ** 2, DATA, rtol=1e-5)


def test_eta_scales_the_noise_and_eta_last_that_of_the_last_step():
    half = EXACT(num_steps=1, basis=SCALAR, eta=0.5, eta_last=0.25)
    found, full = (coefficients(PROCESS, q)[4] for q in (half, COVARIANCE))
    np.testing.assert_allclose(found[1][:-1], 0.5 * full[1][:-1], rtol=1e-5)
    np.testing.assert_allclose(found[3][-1], 0.125 * full[3][-1], rtol=1e-5)
    np.testing.assert_allclose(found[0], full[0], rtol=1e-6)
    denoised = EXACT(num_steps=1, basis=SCALAR, eta_last=0.0)
    found = coefficients(PROCESS, denoised)[4]
    np.testing.assert_allclose(found[1][:-1], full[1][:-1], rtol=1e-6)
    np.testing.assert_array_equal(found[3][-1], 0.0)


@pytest.mark.parametrize("process", [PROCESS, FLOW])
def test_without_noise_it_is_ddim_to_the_last_bit(process):
    samples = [
        jax.jit(
            lambda keys, sampler=sampler: base.sample(
                sampler, process, mixture(process), keys, (3,)
            )
        )(KEYS)
        for sampler in (Ddim(num_steps=5), build(num_steps=5, eta=0.0))
    ]
    np.testing.assert_array_equal(*samples)
    assert np.unique(samples[0]).size == 12


@functools.cache
def image_steps(num_steps, eta=1.0):
    """Variance per frequency of samples of an image with variances 1 / (1 + |k|²)."""
    k1, k2 = np.mgrid[:16, :16]
    variances = (1.0 / (1.0 + k1**2 + k2**2)).astype(np.float32)[..., None]
    frame = bases.DctGlobal().frame((16, 16, 1))
    sampler = EXACT(num_steps=num_steps, eta=eta)

    def predict(z_t, t):
        alpha, sigma = PROCESS.schedule.alpha_sigma(t)
        total = alpha**2 * variances + sigma**2
        spectrum = frame.forward(z_t)
        return Prediction(
            frame.inverse(alpha * variances / total * spectrum),
            frame.inverse(sigma / total * spectrum),
        )

    @jax.jit
    def moments(keys):
        x = base.sample(sampler, PROCESS, predict, keys, (16, 16, 1))
        return jnp.mean(frame.forward(x) ** 2, 0)

    keys = jax.random.split(jax.random.key(num_steps), 1024)
    return np.asarray(moments(keys)) / variances


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_every_frequency_of_an_image_has_its_variance(num_steps):
    ratio = image_steps(num_steps)
    # A variance of 1024 numbers has the relative standard error sqrt(2 / 1024).
    error = (2 / 1024) ** 0.5
    assert np.abs(ratio - 1).max() < 5 * error
    assert ratio.mean() == pytest.approx(1, abs=5 * error / 16)


def test_ddim_falls_short_at_every_frequency_of_an_image():
    ratio = image_steps(4, eta=0.0)
    # 0.5308 for c = 1, and less the further c is from it.
    assert ratio[0, 0, 0] == pytest.approx(0.5308, rel=5 * (2 / 1024) ** 0.5)
    assert ratio.max() < 0.66 and ratio[8:].max() < 0.3


@functools.cache
def vector_noise(basis):
    """Covariance of the samples of one step, for data with a random covariance."""
    root = np.random.default_rng(0).normal(size=(8, 8))
    matrix = np.float32(root @ root.T / 8 + 0.1 * np.eye(8))

    def predict(z_t, t):
        alpha, sigma = PROCESS.schedule.alpha_sigma(t)
        precision = jnp.linalg.inv(alpha**2 * matrix + sigma**2 * jnp.eye(8))
        eps = jnp.matmul(z_t, sigma * precision, precision="highest")
        x = jnp.matmul(z_t, alpha * matrix @ precision, precision="highest")
        return Prediction(x, eps)

    sampler = EXACT(num_steps=1, basis=basis)
    keys = jax.random.split(jax.random.key(0), 8)
    with mock.patch.object(base, "normal", lambda keys, shape: jnp.eye(8)):
        state = sampler.init(jnp.zeros((8, 8)), jnp.float32(1))
        state = jax.jit(
            lambda state: sampler.step(
                PROCESS, predict, state, jnp.float32(1), jnp.float32(0), keys
            )
        )(state)
    # Row d is Sigma^(1/2) of unit d.
    return matrix, np.asarray(state.x)


def test_any_covariance_is_met_by_the_oracle_and_by_lanczos():
    matrix, oracle = vector_noise(bases.Oracle(num_products=8))
    np.testing.assert_allclose(oracle.T @ oracle, matrix, atol=1e-5)
    _, lanczos = vector_noise(bases.Lanczos(num_products=8))
    np.testing.assert_allclose(lanczos, oracle, atol=1e-5)
    _, diagonal = vector_noise(bases.DctGlobal())
    assert np.abs(diagonal.T @ diagonal - matrix).max() > 0.1


def test_the_jacobian_gives_the_variance_of_the_posterior():
    t = PROCESS.schedule.inverse(jnp.log(jnp.float32(0.36 / 0.64)))
    predict = mixture(PROCESS, means=(-2.0, 2.0), std=0.5, weights=(0.3, 0.7))
    z_t = jnp.array([[-0.5], [0.2], [1.0]])

    @jax.jit
    def draw(z_t):
        tangent = covariance.DERIVATIVES["jvp"].at(lambda z: predict(z, t), z_t, 0.0)
        return SCALAR.draw(
            tangent, KEYS[:3], (1,), lambda q: COVARIANCE._variances(PROCESS, q, t)
        )

    with mock.patch.object(base, "normal", ones):
        prediction, noise = draw(z_t)
    expected = [-0.766353, 1.157305, 1.903667]
    np.testing.assert_allclose(prediction.x[:, 0], expected, atol=2e-6)
    expected = [2.853293, 2.047753, 0.409834]
    np.testing.assert_allclose(noise[:, 0] ** 2, expected, rtol=5e-6)


def density(z, process, t, std=0.1):
    """q(z_t) of the mixture at -1 and 1, float64."""
    alpha, sigma = (float(q) for q in process.schedule.alpha_sigma(np.float32(t)))
    scale = math.hypot(alpha * std, sigma)
    return 0.5 * sum(stats.norm.pdf(z, mean, scale) for mean in (-alpha, alpha))


@pytest.mark.parametrize(
    ("process", "total", "mean_only"), [(PROCESS, 1.005, 0.8576), (FLOW, None, None)]
)
def test_one_step_has_the_variance_of_the_marginal_for_any_data(
    process, total, mean_only
):
    t, s = jnp.float32(0.75), jnp.float32(0.5)
    z = jnp.linspace(-6, 6, 4001, dtype=jnp.float32)[:, None]
    keys = jax.random.split(KEYS[0], len(z))

    @jax.jit
    def means_and_scales(z):
        step = functools.partial(COVARIANCE.step, process, mixture(process))
        mean = DDIM.step(process, mixture(process), base.State(z, z), t, s, keys).z
        return mean, step(base.State(z, z), t, s, keys).z - mean

    with mock.patch.object(base, "normal", ones):
        mean, scale = (np.float64(q)[:, 0] for q in means_and_scales(z))
    weight = density(np.float64(z)[:, 0], process, 0.75)
    weight /= weight.sum()
    alpha, sigma = (float(q) for q in process.schedule.alpha_sigma(s))
    found = weight @ (mean**2 + scale**2)
    assert found == pytest.approx(alpha**2 * 1.01 + sigma**2, rel=1e-5)
    assert weight @ mean**2 < 0.95 * found
    if total:
        assert found == pytest.approx(total, abs=1e-5)
        assert weight @ mean**2 == pytest.approx(mean_only, abs=6e-5)


@pytest.mark.parametrize("process", [PROCESS, FLOW, EXPLODING])
def test_a_step_with_a_draw_of_the_posterior_is_exact_in_law(process):
    t, s = np.float32(0.75), np.float32(0.5)
    alpha_t, sigma_t = (float(q) for q in process.schedule.alpha_sigma(t))
    _, sigma_s = (float(q) for q in process.schedule.alpha_sigma(s))
    kappa, std = float(base.ddim_weight(process, t, s)), 0.1
    total = (alpha_t * std) ** 2 + sigma_t**2
    width = 8 * (alpha_t + total**0.5)
    z = np.linspace(-width, width, 20_001)
    means = np.array([-1.0, 1.0])[:, None]
    share = stats.norm.pdf(z, alpha_t * means, total**0.5) / 2
    x_hat = means + alpha_t * std**2 / total * (z - alpha_t * means)
    scale = kappa * std * sigma_t / total**0.5
    z_s = np.linspace(-2, 2, 9)[:, None, None] * (1 + sigma_s)
    moved = stats.norm.pdf(z_s, sigma_s / sigma_t * z + kappa * x_hat, scale)
    found = np.sum(share * moved, axis=(1, 2)) * (z[1] - z[0])
    expected = density(z_s[:, 0, 0], process, s)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


W1 = {
    "ddim": (0.444, 0.194, 0.092, 0.050, 0.039, 0.022),
    "covariance": (0.340, 0.159, 0.070, 0.016, 0.006, 0.002),
    "denoised": (0.341, 0.137, 0.074, 0.048, 0.040, 0.021),
}
MIXTURE_STEPS = (2, 3, 4, 6, 8, 16)


@functools.cache
def mixture_samples(name):
    """Samples per number of steps, sorted `[n]`, from the quantiles of z_1."""
    options = {"ddim": dict(eta=0.0), "covariance": {}, "denoised": dict(eta_last=0.0)}
    sampler = EXACT(num_steps=1, basis=SCALAR, **options[name])
    n = 1 << 15
    start = special.ndtri((np.arange(n) + 0.5) / n).astype(np.float32)[:, None]
    keys = jax.random.split(jax.random.key(2), n)

    @jax.jit
    def step(state, t, s, use):
        noise_keys = base.fold(keys, use)
        return sampler.step(PROCESS, mixture(PROCESS), state, t, s, noise_keys)

    found = {}
    for num_steps in MIXTURE_STEPS:
        times = np.arange(num_steps, -1, -1, dtype=np.float32) / num_steps
        times[0] = 0.999
        state = base.State(start, start)
        for i in range(num_steps):
            state = step(state, times[i], times[i + 1], 100 * num_steps + i)
        found[num_steps] = np.sort(np.float64(state.x)[:, 0])
    return found


@functools.cache
def mixture_quantiles(n):
    grid = np.linspace(-1.8, 1.8, 200_001)
    below = 0.5 * (special.ndtr((grid + 1) / 0.1) + special.ndtr((grid - 1) / 0.1))
    return np.interp((np.arange(n) + 0.5) / n, below, grid)


def distance(x):
    return np.abs(x - mixture_quantiles(len(x))).mean()


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("name", W1)
def test_distance_to_a_mixture(name, index):
    x = mixture_samples(name)[MIXTURE_STEPS[index]]
    # Half a last digit, 3e-4 of the table, and 32768 samples that start as quantiles:
    # swaps between the modes, at most sqrt(n) / 2 of 2 n each way, are 0.0055 of W1.
    tolerance = 1e-3 if name == "ddim" else 6e-3
    assert distance(x) == pytest.approx(W1[name][index], abs=tolerance)
    if name == "covariance":
        assert x.var() / 1.01 == pytest.approx(0.995, abs=0.015)
    if name == "ddim":
        expected = (0.39, 0.72, 0.86, 0.94, 0.96, 0.97)[index]
        assert x.var() / 1.01 == pytest.approx(expected, abs=0.006)


def test_the_mixture_is_closer_than_by_ddim_from_six_steps_on():
    for n in (6, 8, 16):
        ddim, own = (distance(mixture_samples(q)[n]) for q in ("ddim", "covariance"))
        assert own < 0.5 * ddim
    assert distance(mixture_samples("covariance")[8]) < distance(
        mixture_samples("ddim")[16]
    )


def test_finite_differences_agree_with_the_derivative():
    t = jnp.float32(0.6)
    predict = mixture(PROCESS, std=0.5)
    z_t, v = (jax.random.normal(key, (64, 4)) for key in KEYS[:2])

    @jax.jit
    def products(z_t, v):
        tangents = [
            rule.at(lambda z: predict(z, t), z_t, 1e-2)
            for rule in covariance.DERIVATIVES.values()
        ]
        single = [tangent.product(v)[1] for tangent in tangents]
        return single, [tangent.linearise()[1](10.0 * v) for tangent in tangents]

    single, several = products(z_t, v)
    exact, central, one_sided = single
    size = jnp.abs(exact).max()
    assert jnp.abs(central - exact).max() < 1e-3 * size
    assert 1e-3 * size < jnp.abs(one_sided - exact).max() < 0.05 * size
    # The step is in units of the probe: ten times the probe is ten times the product.
    for one, ten in zip(single, several, strict=True):
        np.testing.assert_allclose(10.0 * one, ten, atol=1e-2 * float(size))


@pytest.mark.parametrize("difference", [0.1, 0.2])
def test_the_size_of_the_difference_is_that_of_the_field(difference):
    """For x_hat = z³ the central difference at 0 is its square."""
    sampler = EXACT(
        num_steps=1,
        basis=bases.PixelIsotropic(),
        derivative="central",
        difference=difference,
    )
    t = PROCESS.schedule.inverse(jnp.float32(0.0))
    state = sampler.init(jnp.zeros((4, 1)), t)
    predict = lambda z, t: Prediction(z**3, z)  # noqa: E731
    with mock.patch.object(base, "normal", ones):
        x = sampler.step(PROCESS, predict, state, t, jnp.float32(0), KEYS).x
    # sigma² / alpha is sqrt(1/2) here.
    np.testing.assert_allclose(x, 0.5**0.25 * difference, rtol=1e-4)


def test_a_network_in_bfloat16_needs_a_larger_difference():
    numbers = np.random.default_rng(0)
    first, last = (np.float32(numbers.normal(size=(64, 64)) / 8) for _ in range(2))
    t = jnp.float32(0.5)

    def denoise(z, dtype):
        hidden = jnp.tanh(z.astype(dtype) @ first.astype(dtype))
        return PROCESS.predict(hidden @ last.astype(dtype), z, t)

    @jax.jit
    def products(z_t, v):
        def product(name, size, dtype=jnp.bfloat16):
            rule = covariance.DERIVATIVES[name]
            return rule.at(lambda z: denoise(z, dtype), z_t, size).product(v)[1]

        exact = product("jvp", 0.0, jnp.float32)
        return exact, product("central", 0.2), product("central", 1e-2)

    z_t, v = jax.random.normal(KEYS[0], (4, 64)), bases.signs(KEYS, (64,))
    exact, large, small = products(z_t, v)
    large, small = (
        np.linalg.norm(found - exact) / np.linalg.norm(exact)
        for found in (large, small)
    )
    assert large < 0.04 and small > 0.08


def counted():
    """A prediction that counts its evaluations, its products, and how often traced."""
    count = {"plain": 0, "product": 0, "traced": 0}

    def tick(name):
        count[name] += 1

    @jax.custom_jvp
    def square(z):
        jax.debug.callback(lambda: tick("plain"))
        return jnp.tanh(z)

    @square.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda: tick("product"))
        return jax.jvp(jnp.tanh, primals, tangents)

    def predict(z_t, t):
        count["traced"] += 1
        return Prediction(square(z_t), z_t)

    return predict, count


@pytest.mark.parametrize(
    ("options", "evaluations", "free", "plain", "products"),
    [
        ({}, 10, 5, 0, 5),
        (dict(eta=0.0), 5, 5, 5, 0),
        (dict(eta_last=0.0), 9, 5, 1, 4),
        (dict(derivative="one_sided"), 10, 10, 10, 0),
        (dict(derivative="central"), 15, 15, 15, 0),
        (dict(derivative="central", eta_last=0.0), 13, 13, 13, 0),
    ],
)
def test_evaluations_are_counted(options, evaluations, free, plain, products):
    sampler = build(num_steps=5, basis=dict(name="dct_global"), **options)
    assert sampler.num_evaluations == evaluations
    assert sampler.num_predictions == free
    predict, count = counted()
    sample = jax.jit(lambda keys: base.sample(sampler, PROCESS, predict, keys, (4,)))
    sample(KEYS).block_until_ready()
    jax.effects_barrier()
    assert (count["plain"], count["product"]) == (plain, products)
    traced = count["traced"]
    sample(KEYS[::-1]).block_until_ready()
    assert count["traced"] == traced
    if not options:
        assert traced == 1


def test_evaluations_of_several_products_are_counted():
    lanczos = dict(name="lanczos", num_products=3)
    assert build(num_steps=5, basis=lanczos).num_evaluations == 20
    assert build(num_steps=5, basis=lanczos).num_predictions == 5
    central = build(num_steps=5, basis=lanczos, derivative="central")
    assert central.num_evaluations == central.num_predictions == 35


def variance_of(sampler, slope, t):
    """Eigenvalue of Sigma that the sampler takes for J = slope."""
    return np.ravel(sampler._variances(PROCESS, jnp.float32(slope), t))[0]


def test_known_variances_bound_the_estimate():
    sampler = build(basis=dict(name="pixel_isotropic"), data_variances=(0.5,))
    t = PROCESS.schedule.inverse(jnp.float32(0.0))
    # sigma² / alpha is sqrt(1/2) here.
    assert variance_of(sampler, 1.0, t) == pytest.approx(0.5**0.5, rel=1e-5)
    assert variance_of(sampler, 100.0, t) == 2.0
    assert variance_of(sampler, -1.0, t) == 0.0
    assert variance_of(build(), 100.0, t) == pytest.approx(5000**0.5, rel=1e-5)
    assert variance_of(build(), -1.0, t) == 0.0


def test_the_estimate_is_not_used_where_it_is_not_reliable():
    isotropic = dict(name="pixel_isotropic")
    noisy = PROCESS.schedule.inverse(jnp.float32(-8.5))
    known = dict(basis=isotropic, data_variances=(0.5,))
    assert variance_of(build(**known), 1.0, noisy) == 0.5
    assert variance_of(build(logsnr_reliable=-9.0, **known), 1.0, noisy) == 2.0
    assert variance_of(build(), 1.0, noisy) == 0.0
    # sigma² / alpha there is exp(4.25) but for a part of exp(-8.5).
    found = variance_of(build(logsnr_reliable=-9.0), 1.0, noisy)
    assert found == pytest.approx(math.exp(4.25), rel=1e-3)


def test_a_random_guided_network_is_sampled_without_a_nan():
    spec = DataSpec((8, 8, 3), 4)
    block = dict(name="dit", patch_size=4, width=16, num_layers=1, num_heads=2)
    module = registry.build(
        "network", block, "config.networks.x", spec=spec, dtype="float32"
    )
    net = network.as_network(module, spec)
    process = Gaussian(
        schedule=Cosine(logsnr_min=-12.0, logsnr_max=12.0), prediction="v"
    )
    guide = registry.build(
        "guidance", dict(name="classifier_free", guidance_scale=3.0), "config.guidance"
    )

    def conditional(params, z_t, t, cond):
        size = z_t.shape[0]
        full = jnp.full(size, t)
        cond = {**cond, "t": full, "logsnr": process.schedule.logsnr(full)}
        return process.predict(net.apply(params, z_t, cond), z_t, full)

    numbers = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.float32(0.3 * numbers.normal(size=p.shape)),
        jax.eval_shape(net.init, KEYS[0]),
    )

    @jax.jit
    def sample(params, keys):
        guided = guide(functools.partial(conditional, params), process, spec)
        cond = {"label": jnp.arange(2, dtype=jnp.int32)}
        return base.sample(
            build(num_steps=4, grid=dict(name="logsnr", logsnr_max=11.9)),
            process,
            lambda z_t, t: guided(z_t, t, cond),
            keys,
            spec.shape,
        )

    x = sample(params, KEYS[:2])
    assert np.isfinite(x).all() and np.abs(x).max() > 0.1


def check(shape, **options):
    build(**options).check(PROCESS, DataSpec(shape))


def test_a_basis_that_does_not_suit_the_data_is_refused():
    check((8, 8, 3))
    check((2,), basis=dict(name="dct_global"))
    check((2,), basis=dict(name="oracle", num_products=2))
    with pytest.raises(ValueError, match="basis: .*images.*pixel_isotropic, lanczos"):
        check((2,))
    with pytest.raises(ValueError, match=r"basis\.num_products: must be the 2 entries"):
        check((2,), basis=dict(name="oracle", num_products=3))


def test_variances_that_do_not_suit_the_basis_are_refused():
    isotropic = dict(name="pixel_isotropic")
    check((8, 8, 1), data_variances=(1.0,))
    check((2, 2, 1), data_variances=[[[1.0], [2.0]], [[3.0], [4.0]]])
    with pytest.raises(ValueError, match=r"data_variances: .*\[8, 8, 1\], got \[3\]"):
        check((8, 8, 1), basis=isotropic, data_variances=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="data_variances: .*pixel_isotropic"):
        check((8, 8, 1), basis=dict(name="lanczos"), data_variances=(1.0,))


@pytest.mark.parametrize(
    "options",
    [dict(eta=1.5), dict(eta_last=-0.1), dict(derivative="backward"),
     dict(num_steps=0), dict(difference=0.0)],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"config.sampler.{name}: "):
        build(**options)
