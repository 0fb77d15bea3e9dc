"""Exact denoisers of a joint distribution, and the exact output of a sampler of them.

Nothing is drawn: the distribution over all states z goes through the transition
probabilities of every step. Needs at most a few hundred states.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.processes.categorical import Categorical
from diffusionlab.samplers import grids, tokens
from diffusionlab.schedules import alpha
from diffusionlab.types import CategoricalPrediction, DataSpec


def process(joint, noise="masked", schedule=None, block_length=0) -> Categorical:
    """The process of a joint, linear unless said otherwise."""
    return Categorical(
        spec=DataSpec(shape=(joint.length,), num_tokens=joint.num_tokens),
        schedule=schedule or alpha.Linear(),
        noise=noise,
        block_length=block_length,
    )


def oracle(joint, process):
    """Returns `predict(z_t, t)`: p(x_i | z_t) of the joint, of any z_t `[B, L]`."""
    sequences, probs = jnp.asarray(joint.sequences), jnp.asarray(joint.probs)
    one_hot = jax.nn.one_hot(sequences, joint.num_tokens)  # [X, L, K]

    def predict(z_t, t):
        same = z_t[:, None, :] == sequences
        if process.is_masked:
            likelihood = same | (z_t[:, None, :] == process.mask)
        else:
            noise = process.one_minus_alpha(t, 1) / joint.num_tokens
            likelihood = process.alpha(t, 1) * same + noise
        weight = probs * jnp.prod(likelihood.astype(jnp.float32), axis=-1)
        found = jnp.einsum("bx,xlk->blk", weight, one_hot)
        found /= jnp.maximum(jnp.sum(found, axis=-1, keepdims=True), 1e-30)
        return CategoricalPrediction(jnp.log(jnp.maximum(found, 1e-30)))

    return predict


def states(joint, process) -> np.ndarray:
    """Every z, `[S, L]`."""
    symbols = range(process.num_symbols)
    return np.array(list(itertools.product(symbols, repeat=joint.length)), np.int32)


def matrix(p, z) -> np.ndarray:
    """Returns p(z_s | z_t) `[S, S]` of positions that move by themselves.

    Args:
      p: `[S, L, M]`, of each position.
      z: every state, `[S, L]`.
    """
    found = np.ones((len(z), len(z)))
    for i in range(z.shape[1]):
        found *= p[:, i][:, z[:, i]]
    return found


class Pushed:
    """A sampler with a `law(process, log_x, z_t, t, s)` of each position.

    Attributes:
      joint: of the data; the network is its oracle.
      process: of the noise.
      z: every state, `[S, L]`.
      steps: `steps(t, s)` are the transition probabilities `[S, S]`; compiled once.
    """

    def __init__(self, joint, process, law=tokens.law):
        self.joint, self.process = joint, process
        self.z = states(joint, process)
        predict = oracle(joint, process)
        log_p = jax.jit(
            lambda t, s: law(process, predict(self.z, t).logits, self.z, t, s)
        )
        self.steps = lambda t, s: matrix(np.exp(np.float64(log_p(t, s))), self.z)

    def prior(self) -> np.ndarray:
        """Of z_1 over the states, `[S]`."""
        if self.process.is_masked:
            return np.all(self.z == self.process.mask, axis=1).astype(float)
        return np.full(len(self.z), 1 / len(self.z))

    def output(self, num_steps, grid=None, prior=None) -> np.ndarray:
        """Returns the distribution of samples, `[K^L]`; the grid None is uniform."""
        grid = grid or grids.Uniform()
        times = np.float32(grid(self.process.schedule, num_steps))
        p = self.prior() if prior is None else prior
        for t, s in itertools.pairwise(times):
            p = p @ self.steps(t, s)
        clean = np.all(self.z < self.joint.num_tokens, axis=1)
        assert abs(p[~clean].sum()) < 1e-6, "masks are left"
        return p[clean]

    def error(self, num_steps, grid=None) -> float:
        """Returns the total variation between samples and data."""
        return distance(self.output(num_steps, grid), self.joint.probs)


def distance(p, q) -> float:
    """Total variation."""
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)


def check_counts(x, p, num_symbols) -> None:
    """Asserts that rows x `[N, L]` came with probabilities p, `[M^L]`."""
    index = np.ravel_multi_index(tuple(np.asarray(x).T), (num_symbols,) * x.shape[1])
    found = np.bincount(index, minlength=len(p)) / len(x)
    # Five standard errors, and what one count is of a cell that is nearly empty.
    bound = 5 * np.sqrt(np.maximum(p * (1 - p), 0) / len(x)) + 3 / len(x)
    np.testing.assert_array_less(np.abs(found - p), bound + 1e-6)
