"""Students with one number per time, x_hat = a(t) z: their best a is solved, not found.

The data are N(0, c²); times are i / T for i = 1 ... T.
"""

import jax.numpy as jnp
import numpy as np

from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import Network, Prediction, Teacher, lift

# All but alpha = cos(pi t / 2): the ends are 1e-9 away from it.
PROCESS = Gaussian(schedule=Cosine(logsnr_min=-40.0, logsnr_max=40.0), prediction="x")


def scales(t):
    """alpha and sigma in float64."""
    return np.cos(np.pi / 2 * np.float64(t)), np.sin(np.pi / 2 * np.float64(t))


def variance(t, c):
    alpha, sigma = scales(t)
    return alpha**2 * c**2 + sigma**2


def denoiser(t, c):
    """a(t) of E[x | z_t]."""
    return scales(t)[0] * c**2 / variance(t, c)


def jump(t, b, c):
    """a(t) of the x with which DDIM follows the probability flow from t to b."""
    (alpha_t, sigma_t), (alpha_b, sigma_b) = scales(t), scales(b)
    along = np.sqrt(variance(b, c) / variance(t, c))
    ratio = sigma_b / sigma_t
    return (along - ratio) / (alpha_b - alpha_t * ratio)


def factors(number, c):
    """What DDIM multiplies z by in each of `number` equal steps, exact denoiser."""
    t, s = np.arange(number, 0, -1) / number, np.arange(number - 1, -1, -1) / number
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(t), scales(s)
    return (alpha_s * alpha_t * c**2 + sigma_s * sigma_t) / variance(t, c)


def network(number):
    """x_hat = a[t number] z, with parameters {'a': `[number + 1]`}."""

    def apply(params, z, cond, *, train=False, key=None):
        place = jnp.round(cond["t"] * number).astype(jnp.int32)
        return lift(params["a"][place], z.ndim) * z

    return Network(lambda key: {"a": jnp.zeros(number + 1)}, apply, ())


def teacher(c):
    """The exact denoiser, for data with and without labels."""

    def predict(params, z_t, t, cond):
        alpha, sigma = PROCESS.schedule.alpha_sigma(jnp.broadcast_to(t, z_t.shape[:1]))
        v = (alpha * c) ** 2 + sigma**2
        x, eps = (lift(q / v, z_t.ndim) * z_t for q in (alpha * c**2, sigma))
        return Prediction(x, eps)

    return Teacher(predict, has_null_label=False)
