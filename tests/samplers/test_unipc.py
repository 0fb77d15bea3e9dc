"""UniPC against the linear systems of its source, solved in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import known
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import Prediction

COSINE, FLOW = (Gaussian(schedule=q, prediction="v") for q in (Cosine(), Flow()))
TIMES = np.float32([0.9, 0.8, 0.65, 0.55, 0.35, 0.3, 0.2])
Z = np.float32([[-1.2, 0.4, 2.0]])


def build(order, variant="bh2", num_steps=6):
    block = {"name": "unipc", "num_steps": num_steps, "order": order}
    block["variant"] = variant
    return registry.build("sampler", block, "config.sampler")


def x_hat(z, half_logsnr, alpha):
    """Any smooth denoiser serves here."""
    return np.tanh(z / alpha) * 0.5 + 0.1 * half_logsnr


@functools.cache
def predictor(process):
    def predict(z_t, t):
        alpha, sigma = process.schedule.alpha_sigma(t)
        half = 0.5 * process.schedule.logsnr(t)
        x = jnp.tanh(z_t / alpha) * 0.5 + 0.1 * half
        return Prediction(x, (z_t - alpha * x) / sigma)

    return predict


def solve(sampler, process, predict, times=TIMES, z=Z):
    return known.solve(sampler, process, predict, times, z)


def systems(ratios, h, variant, simple):
    """rho of R rho = b: sum_m rho_m r_m^(k-1) = k! h phi_{k+1}(-h) / B, and B."""
    scale = -h if variant == "bh1" else np.expm1(-h)
    if simple:
        return np.array([0.5]), scale
    phi, b = np.expm1(-h) / -h - 1.0, []
    for k in range(1, len(ratios) + 1):
        b.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1.0 / math.factorial(k + 1)
    rows = [np.array(ratios) ** k for k in range(len(ratios))]
    return np.linalg.solve(np.array(rows), np.array(b)), scale


def reference(process, order, variant):
    """The latents before the first step and after each, not corrected, in float64."""
    alphas, sigmas = (np.float64(q) for q in process.schedule.alpha_sigma(TIMES))
    half = np.log(alphas) - np.log(sigmas)
    found, predictions = [np.float64(Z)], []
    start = found[0]

    def advance(z, i, others, ratios, simple):
        h = half[i + 1] - half[i]
        rest = 0.0
        if others:
            rho, scale = systems(ratios, h, variant, simple)
            slopes = [
                (other - predictions[i]) / r
                for other, r in zip(others, ratios, strict=True)
            ]
            rest = scale * sum(a * b for a, b in zip(rho, slopes, strict=True))
        first = (
            sigmas[i + 1] / sigmas[i] * z
            - alphas[i + 1] * np.expm1(-h) * (predictions[i])
        )
        return first - alphas[i + 1] * rest

    for i in range(len(TIMES) - 1):
        predictions.append(x_hat(found[i], half[i], alphas[i]))
        if i:
            p = min(order, i)
            older = range(i - 2, i - 1 - p, -1)
            h = half[i] - half[i - 1]
            ratios = [(half[j] - half[i - 1]) / h for j in older] + [1.0]
            others = [predictions[j] for j in older] + [predictions[i]]
            start = advance(start, i - 1, others, ratios, p == 1)
        p = min(order, i + 1)
        older = range(i - 1, i - p, -1)
        ratios = [(half[j] - half[i]) / (half[i + 1] - half[i]) for j in older]
        others = [predictions[j] for j in older]
        found.append(advance(start, i, others, ratios, p == 2))
    return found


@pytest.mark.parametrize("process", [COSINE, FLOW], ids=["cosine", "flow"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_steps_are_those_of_the_linear_systems(order, variant, process):
    expected = reference(process, order, variant)
    found = solve(build(order, variant), process, predictor(process))
    np.testing.assert_allclose(found.z, expected[-1], rtol=1e-5, atol=5e-6)


def test_order_and_variant_matter():
    found = [
        np.asarray(solve(build(order, variant), COSINE, predictor(COSINE)).z)
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
    ]
    gaps = [np.abs(a - b).max() for i, a in enumerate(found) for b in found[:i]]
    assert min(gaps) > 1e-4


def test_the_first_step_and_the_last_are_ddim():
    for times in (TIMES[:2], np.float32([0.4, 0.0])):
        found = solve(build(3), FLOW, predictor(FLOW), times)
        expected = solve(Ddim(num_steps=1), FLOW, predictor(FLOW), times)
        np.testing.assert_allclose(found.z, expected.z, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.x, expected.x, rtol=1e-6)


@pytest.mark.parametrize("process", [COSINE, FLOW], ids=["cosine", "flow"])
def test_a_point_mass_is_exact_in_any_number_of_steps(process):
    def predict(z_t, t):
        alpha, sigma = process.schedule.alpha_sigma(t)
        return Prediction(jnp.full_like(z_t, 0.7), (z_t - alpha * 0.7) / sigma)

    found = solve(build(3), process, predict)
    direct = solve(Ddim(num_steps=1), process, predict, TIMES[[0, -1]])
    np.testing.assert_allclose(found.z, direct.z, rtol=1e-5, atol=2e-6)


def test_the_network_is_traced_once_and_a_step_evaluates_it_once():
    traced, seen = [], []

    def predict(z_t, t):
        traced.append(t.shape)
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return predictor(COSINE)(z_t, t)

    keys = jax.random.split(jax.random.key(0), len(Z))
    base.solve(build(3), COSINE, predict, jnp.asarray(Z), TIMES, keys)
    jax.effects_barrier()
    assert traced == [()]
    np.testing.assert_array_equal(np.float32(seen), TIMES[:-1])


def test_it_starts_at_t_0_and_at_t_1():
    for times in (np.linspace(0, 1, 9), np.linspace(1, 0, 9)):
        for process in (COSINE, FLOW):
            found = solve(build(3), process, predictor(process), np.float32(times))
            assert np.all(np.isfinite(found.z)) and np.all(np.isfinite(found.x))


@pytest.mark.parametrize("order", [0, 4])
def test_an_order_outside_its_range_is_refused(order):
    with pytest.raises(ValueError, match=r"config.sampler.order: must be in 1..3"):
        build(order)


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="variant: expected 'bh1' or 'bh2'"):
        build(3, "bh3")
