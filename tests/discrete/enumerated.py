"""Joint distributions of a few tokens, and their exact denoisers by enumeration."""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Joint:
    """P over all sequences of L tokens out of K; float64 throughout.

    Attributes:
      table: `[K] * L`, sums to 1.
    """

    table: np.ndarray

    @property
    def length(self) -> int:
        return self.table.ndim

    @property
    def num_tokens(self) -> int:
        return self.table.shape[0]

    @property
    def sequences(self) -> np.ndarray:
        """Every x, `[K^L, L]`."""
        return np.array(
            list(itertools.product(range(self.num_tokens), repeat=self.length))
        )

    @property
    def probs(self) -> np.ndarray:
        """Of `sequences`, `[K^L]`."""
        return self.table.reshape(-1)

    def log_prob(self, x) -> float:
        return float(np.log(self.table[tuple(x)]))

    @property
    def entropy(self) -> float:
        p = self.probs[self.probs > 0]
        return float(-(p * np.log(p)).sum())

    def denoiser(self, z, alpha: float, mask: int | None, skip_own: bool = False):
        """Returns p(x_i | z), `[L, K]`, of one z.

        Args:
          z: `[L]`; tokens, or the mask.
          alpha: of its time.
          mask: the symbol of it; None is uniform noise.
          skip_own: p(x_i | z without position i).
        """
        k = self.num_tokens
        likelihood = np.ones((self.length, k))
        for i, symbol in enumerate(z):
            if mask is None:
                likelihood[i] = (1 - alpha) / k
                likelihood[i, symbol] += alpha
            elif symbol != mask:
                likelihood[i] = np.eye(k)[symbol]
        found = np.zeros((self.length, k))
        for i in range(self.length):
            weight = likelihood.copy()
            if skip_own:
                weight[i] = 1
            joint = self.table
            for j in range(self.length):
                shape = [1] * self.length
                shape[j] = k
                joint = joint * weight[j].reshape(shape)
            others = tuple(j for j in range(self.length) if j != i)
            found[i] = joint.sum(axis=others)
        return found / found.sum(axis=1, keepdims=True)


def chain() -> Joint:
    """Three tokens of three: a Markov chain; its entropy is 2.602681 nats."""
    first = np.array([0.5, 0.3, 0.2])
    step = np.array([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
    return Joint(np.einsum("a,ab,bc->abc", first, step, step))


def bits(equal: float = 1.0) -> Joint:
    """Two bits that are equal with this probability."""
    differ = (1 - equal) / 2
    return Joint(np.array([[equal / 2, differ], [differ, equal / 2]]))


def product(*marginals) -> Joint:
    """Independent tokens."""
    table = np.ones(())
    for marginal in marginals:
        table = np.multiply.outer(table, np.asarray(marginal, float))
    return Joint(table)
