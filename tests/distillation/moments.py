"""Moments of a linear student on N(0, c²) data, and expectations without sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.distillation import moment_matching
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import Network, Prediction, Teacher

# As `toys.PROCESS` to 1e-6, but t = 1 has a noise level.
PROCESS = Gaussian(schedule=Cosine(logsnr_min=-30, logsnr_max=30), prediction="x")


def scales(t):
    return np.cos(np.pi / 2 * t), np.sin(np.pi / 2 * t)


def posterior(t, s):
    """Az, Ax and v of z_s = Az z_t + Ax x + sqrt(v) n, from alpha and sigma alone."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(t), scales(s)
    square = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    a_z = alpha_t / alpha_s * sigma_s**2 / sigma_t**2
    return a_z, alpha_s * square / sigma_t**2, sigma_s**2 * square / sigma_t**2


def total(t, c):
    alpha, sigma = scales(t)
    return alpha**2 * c**2 + sigma**2


def moments(a, t, s, c):
    """kg and kq: E[x | z_s] = k z_s for the student x~ = a z_t and for the data."""
    a_z, a_x, v = posterior(t, s)
    b = a_z + a_x * a
    k_student = a * b * total(t, c) / (b**2 * total(t, c) + v)
    return k_student, scales(s)[0] * c**2 / total(s, c)


def signs(number, repeats=1):
    """All rows of ±1, `[2^number, number]`: exact first and second moments."""
    rows = np.array(list(itertools.product((-1.0, 1.0), repeat=number)), np.float32)
    return np.tile(rows, (repeats, 1))


def draws(c, repeats=1):
    """(x, noise columns): data and two noises in all combinations."""
    rows = signs(3, repeats)
    return jnp.asarray(c * rows[:, :1]), rows[:, 1:]


def replace_noise(monkeypatch, columns):
    """Makes normal draws these columns, in the order drawn.

    The losses of linear networks are quadratic in the noise, so that the mean over all
    combinations of signs is the expectation.
    """
    turn = itertools.cycle(range(columns.shape[1]))
    draw = lambda key, shape, dtype=None: jnp.asarray(  # noqa: E731
        columns[:, next(turn)].reshape(shape)
    )
    monkeypatch.setattr(jax.random, "normal", draw)


def replace_times(monkeypatch, t, s):
    """Puts the examples at these times, numbers or `[B]`."""
    at = lambda objective, key, size: (  # noqa: E731
        jnp.broadcast_to(jnp.float32(t), (size,)),
        jnp.broadcast_to(jnp.float32(s), (size,)),
    )
    monkeypatch.setattr(moment_matching, "times", at)


def slope(a):
    return {"a": jnp.float32(a)}


def tanh(start=0.3):
    """A network that is not linear, with two parameters; `teach` answers as it does."""

    def apply(params, z, cond, *, train=False, key=None):
        return params["out"] * jnp.tanh(params["in"] * z)

    start = {"in": jnp.float32(1.5), "out": jnp.float32(start)}
    network = Network(lambda key: start, apply, ())

    def teach(params, z, t, cond):
        x = apply(params["student"], z, cond)
        alpha, sigma = (q[:, None] for q in PROCESS.schedule.alpha_sigma(t))
        return Prediction(x, (z - alpha * x) / sigma)

    return network, Teacher(teach, False), start
