"""Data whose exact denoiser and probability flow are known, for tests of samplers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.models import analytic
from diffusionlab.types import Prediction, lift


def gaussian(process, mean=0.0, std=1.0):
    """The exact prediction for data N(mean, std²); t is a scalar or `[B]`."""

    def predict(z_t, t):
        alpha, sigma = (
            lift(q, jnp.ndim(z_t)) if jnp.ndim(t) else q
            for q in process.schedule.alpha_sigma(t)
        )
        total = alpha**2 * std**2 + sigma**2
        return Prediction(
            (alpha * std**2 * z_t + sigma**2 * mean) / total,
            sigma * (z_t - alpha * mean) / total,
        )

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


def flow_map(process, z, t, s, mean, std):
    """Where the probability flow of N(mean, std²) data takes z from t to s, float64."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        np.float64(process.schedule.alpha_sigma(jnp.float32(q))) for q in (t, s)
    )
    total_t, total_s = (
        a**2 * std**2 + b**2 for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s))
    )
    return alpha_s * mean + np.sqrt(total_s / total_t) * (
        np.float64(z) - alpha_t * mean
    )


def ones(keys, shape):
    """In place of `base.normal`: what a step adds is then the scale of its noise."""
    return jnp.ones((keys.shape[0], *shape))


@functools.cache
def _step_of(sampler, process, predict, size):
    keys = jax.random.split(jax.random.key(0), size)
    return jax.jit(lambda q, t, s: sampler.step(process, predict, q, t, s, keys))


def solve(sampler, process, predict, times, z):
    """As base.solve, with one compilation for any number of steps."""
    state = sampler.init(jnp.asarray(z), jnp.asarray(times[0]))
    step = _step_of(sampler, process, predict, len(z))
    for t, s in zip(times[:-1], times[1:], strict=True):
        state = step(state, t, s)
    return state
