"""The test bed: x ~ N(0, c² I) and a student x_hat = a z, all in closed form."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.types import DataSpec, Inputs, Network, Prediction, Teacher, lift


@dataclasses.dataclass(frozen=True)
class Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), not truncated."""

    def alpha_sigma(self, t):
        t = jnp.asarray(t, jnp.float32)
        return jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)

    def logsnr(self, t):
        return -2 * jnp.log(jnp.tan(jnp.pi / 2 * jnp.asarray(t, jnp.float32)))

    def derivative(self, t):
        return -2 * jnp.pi / jnp.sin(jnp.pi * jnp.asarray(t, jnp.float32))

    def inverse(self, logsnr):
        return 2 / jnp.pi * jnp.arctan(jnp.exp(-0.5 * jnp.asarray(logsnr)))


PROCESS = Gaussian(schedule=Cosine(), prediction="x")
SPEC = DataSpec((1,))


def linear(start=0.1):
    """A network x_hat = a z with one parameter; read it with `PROCESS`."""

    def apply(params, z, cond, *, train=False, key=None):
        return params["a"] * z

    return Network(lambda key: {"a": jnp.float32(start)}, apply, ())


def variance(t, c):
    """V_t = alpha² c² + sigma²."""
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    return alpha**2 * c**2 + sigma**2


def exact(z_t, t, c):
    """E[x | z_t] and E[eps | z_t] of N(0, c² I) data."""
    alpha, sigma = PROCESS.schedule.alpha_sigma(jnp.broadcast_to(t, z_t.shape[:1]))
    v = alpha**2 * c**2 + sigma**2
    x, eps = (lift(q, z_t.ndim) * z_t for q in (alpha * c**2 / v, sigma / v))
    return Prediction(x, eps)


def teacher(c):
    """The exact denoiser, which has no parameters."""
    return Teacher(lambda params, z, t, cond: exact(z, t, c), has_null_label=False)


def inputs(x, key=0, step=0, params=None, ema=None):
    """What a loss gets, with a teacher without parameters."""
    found = {"teacher": {}, **(params or {})}
    key = jax.random.key(key) if isinstance(key, int) else key
    return Inputs({"x": x}, key, jnp.int32(step), found, ema or {})
