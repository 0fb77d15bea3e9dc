"""Exact networks of known distributions, and schedules once more, in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.objectives import discrete_losses as losses
from diffusionlab.processes.categorical import Categorical
from diffusionlab.schedules import alpha as alphas
from diffusionlab.types import CategoricalPrediction, DataSpec

_START = 0.008 / 1.008 * math.pi / 2
# name -> schedule, alpha and alpha' in numpy.
SCHEDULES = {
    "linear": (alphas.Linear(), lambda t: 1 - t, lambda t: -np.ones_like(t)),
    "log_linear": (
        alphas.LogLinear(),
        lambda t: 1 - 0.999 * t,
        lambda t: np.full_like(t, -0.999),
    ),
    "cosine": (
        alphas.Cosine(),
        lambda t: 1 - np.cos(np.pi / 2 * (1 - t)),
        lambda t: -np.pi / 2 * np.sin(np.pi / 2 * (1 - t)),
    ),
    "polynomial": (
        alphas.Polynomial(power=3.0),
        lambda t: 1 - t**3,
        lambda t: -3 * t**2,
    ),
    "nichol_cosine": (
        alphas.NicholCosine(),
        lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(_START),
        lambda t: (
            -np.sin((t + 0.008) / 1.008 * np.pi / 2)
            / np.cos(_START)
            * (np.pi / 2 / 1.008)
        ),
    ),
    "linear_with_ends": (
        alphas.Linear(end=1e-4),
        lambda t: (1 - 2e-4) * (1 - t) + 1e-4,
        lambda t: np.full_like(t, -(1 - 2e-4)),
    ),
}


def process_of(joint, noise, schedule="linear", prediction="denoiser", **options):
    return Categorical(
        spec=DataSpec(shape=(joint.length,), num_tokens=joint.num_tokens),
        schedule=SCHEDULES[schedule][0],
        noise=noise,
        prediction=prediction,
        **options,
    )


def enumerated(joint, process, z, t, skip_own=False):
    """p(x_i | z), or without z_i, `[B, L, K]` float32; jnp all through.

    A z that cannot be has some number, and not NaN.
    """
    sequences = jnp.asarray(joint.sequences)
    k = joint.num_tokens
    alpha = process.alpha(t, z.ndim, classes=True)
    noise = process.one_minus_alpha(t, z.ndim, classes=True)
    own = jax.nn.one_hot(z, k)
    if process.is_masked:
        likelihood = jnp.where((z == k)[..., None], 1.0, own)
    else:
        likelihood = alpha * own + noise / k
    # [B, sequences, L]
    each = jnp.stack(
        [likelihood[:, i, sequences[:, i]] for i in range(joint.length)], axis=-1
    )
    found = []
    for i in range(joint.length):
        kept = [j for j in range(joint.length) if not (skip_own and j == i)]
        weight = jnp.asarray(joint.probs, jnp.float32)
        weight = weight * jnp.prod(each[..., jnp.asarray(kept)], axis=-1)
        found.append(weight @ jax.nn.one_hot(sequences[:, i], k))
    found = jnp.stack(found, axis=1)
    return found / jnp.maximum(found.sum(-1, keepdims=True), 1e-30)


def oracle(joint, process):
    """`predict(z_t, t)` of the exact denoiser."""

    def predict(z_t, t):
        t = jnp.broadcast_to(t, z_t.shape[:1])
        found = enumerated(joint, process, z_t, t)
        return CategoricalPrediction(jnp.log(jnp.maximum(found, 1e-30)))

    return predict


def noisy(joint, process, x, alpha):
    """Every z that x can become, and its probability at each alpha `[N]`.

    Returns:
      z `[M, L]` int32 and weights `[N, M]` float64.
    """
    k = joint.num_tokens
    x, alpha = np.asarray(x), np.asarray(alpha, np.float64)[:, None, None]
    if process.is_masked:
        hidden = np.array(list(itertools.product([False, True], repeat=len(x))))
        z = np.where(hidden, k, x)
        each = np.where(hidden, 1 - alpha, alpha)
    else:
        z = joint.sequences
        each = alpha * (z == x) + (1 - alpha) / k
    return z.astype(np.int32), each.prod(-1)


def expected(joint, process, rate, predict, many_x, t, alpha, s=None):
    """E over z_t of a rate summed over positions, `[X, N]` float64, by enumeration.

    Args:
      rate: one of `objectives/discrete_losses.py`.
      predict: `(z_t, t [B])` -> the prediction that it gets.
      many_x: `[X, L]`.
      t: `[N]` float64; the program sees it in float32.
      alpha: of t, `[N]`.
      s: `[N]` of chains.
    """
    rows, weights = [], []
    s = t if s is None else s
    for x in many_x:
        z, weight = noisy(joint, process, x, alpha)
        weights.append(weight)
        for ti, si in zip(t, s, strict=True):
            rows += [(x, zi, ti, si) for zi in z]
    x, z = (jnp.asarray(np.stack([r[i] for r in rows]), jnp.int32) for i in (0, 1))
    t, s = (jnp.asarray([r[i] for r in rows], jnp.float32) for i in (2, 3))

    @jax.jit
    def nats(x, z, t, s):
        answer = losses.read(process, predict(z, t), x, z)
        return rate(process, answer, x, z, t, s).sum(-1)

    weight = np.stack(weights)
    return (np.float64(nats(x, z, t, s)).reshape(weight.shape) * weight).sum(-1)


def quadrature(num, power=1.0, first=0.0):
    """Nodes and weights on [first, 1], denser near it with a power above 1."""
    v, w = np.polynomial.legendre.leggauss(num)
    v, w = (v + 1) / 2, w / 2
    t = first + (1 - first) * v**power
    return t, w * (1 - first) * power * v ** (power - 1)


def bound(joint, process, schedule, many_x, predict=None, nodes=(24, 1.0)):
    """The continuous-time bound `[X]`, without what is beyond the schedule's ends."""
    t, w = quadrature(*nodes)
    predict = predict or oracle(joint, process)
    # The digits of alpha that the program has at these times.
    alpha = SCHEDULES[schedule][1](np.float64(np.float32(t)))
    args = (joint, process, losses.elbo, predict, many_x, t, alpha)
    return expected(*args) @ w
