"""Covariance-aware sampling where the exact answer is known."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import gaussian, mixture, ones

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, bases, covariance
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import Prediction

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


@functools.cache
def coefficients(process, sampler):
    """z_s = a z + b noise, and the same of x, per step of every N, for each of DATA.

    Returns `{N: (a, b, a_x, b_x)}`, each float64 `[N, 3]`.
    """
    times = {n: np.arange(n, -1, -1, dtype=np.float32) / n for n in NUM_STEPS}

    def both(z, t, s, variance):
        predict = gaussian(process, std=jnp.sqrt(variance))
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
