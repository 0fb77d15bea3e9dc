"""Networks that are right: the exact denoisers of a gaussian and of a mixture.

For x ~ sum_k w_k N(mu_k, U_k diag(c_k) U_k') and z_t = alpha x + sigma eps, with
d_k = U_k' (z_t - alpha mu_k) and q_k = alpha² c_k + sigma² along each direction:

    r_k ∝ w_k N(d_k; 0, diag(q_k))                                                  (1)
    E[x | z_t] = sum_k r_k (mu_k + U_k (alpha c_k / q_k) d_k)                       (2)
    E[eps | z_t] = sum_k r_k U_k (sigma / q_k) d_k                                  (3)

(3) is (z_t - alpha (2)) / sigma without the cancellation. Given the label, r is 1 at
that component; given the null label it is (1).

They answer in whatever space the process asks for, so they stand wherever a trained
network can: for sampling, for evaluation, as a teacher. Means, variances and weights
are ordinary parameters that start at the truth, so a run of 0 steps is a finished one;
`U_k` is fixed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusionlab.types import Array, Cond, DataSpec, Source, lift

_MAX_DIMENSION = 4096
_NUM_EXAMPLES = 10_000


def denoise(
    z_t: Array,
    alpha: Array,
    sigma: Array,
    log_weights: Array,
    means: Array,
    variances: Array,
    bases: Array | None = None,
) -> tuple[Array, Array]:
    """Returns E[x | z_t] and E[eps | z_t], `[B, D]` each; equations 2 and 3.

    Args:
      z_t: `[B, D]`.
      alpha, sigma: scalars or `[B]`.
      log_weights: `[K]` or `[B, K]`, up to a constant; -inf leaves a component out.
      means: `[K, D]`.
      variances: `[K, D]`, c_k.
      bases: `[K, D, D]`, U_k with directions in columns; None is the identity.
    """
    alpha, sigma = (lift(q, 3) if jnp.ndim(q) else q for q in (alpha, sigma))
    offset = z_t[:, None] - alpha * means
    if bases is not None:
        # The default precision of a GPU or TPU is below float32.
        offset = jnp.einsum("bkd,kde->bke", offset, bases, precision="highest")
    total = alpha**2 * variances + sigma**2
    log_share = log_weights - 0.5 * jnp.sum(offset**2 / total + jnp.log(total), -1)
    share = jax.nn.softmax(log_share, axis=-1)[..., None]
    along_x, along_eps = alpha * variances / total * offset, sigma / total * offset
    if bases is not None:
        along_x, along_eps = (
            jnp.einsum("bke,kde->bkd", q, bases, precision="highest")
            for q in (along_x, along_eps)
        )
    return jnp.sum(share * (means + along_x), 1), jnp.sum(share * along_eps, 1)


def _answer(module, z, cond, weights, means, variances, bases=None) -> Array:
    """Returns the raw output `[B, ...]` of a module for components in numpy."""
    start = {
        "log_weights": np.log(weights),
        "means": means,
        "log_variances": np.log(np.maximum(variances, 1e-12)),
    }
    params = {
        name: module.param(name, lambda _, v=value: jnp.asarray(v, jnp.float32))
        for name, value in start.items()
    }
    log_weights = jax.nn.log_softmax(params["log_weights"])
    if module.spec.num_classes and len(means) > 1:
        label = cond["label"][:, None]
        chosen = label == jnp.arange(len(means))
        known = label < module.spec.num_classes
        log_weights = jnp.where(known & ~chosen, -jnp.inf, log_weights)
    t, process = cond["t"], module.process
    # Undo the scaling of the input: it is linear in z_t.
    z_t = z / process.network_input(jnp.ones_like(z), t)
    alpha, sigma = process.schedule.alpha_sigma(t)
    x, eps = denoise(
        z_t.reshape(len(z), -1),
        alpha,
        sigma,
        log_weights,
        params["means"],
        jnp.exp(params["log_variances"]),
        bases,
    )
    return process.target(x.reshape(z.shape), eps.reshape(z.shape), t)


def _check_dtype(dtype: str) -> None:
    if jnp.dtype(dtype) != jnp.float32:
        raise ValueError(
            f"config.precision.compute: the exact denoisers need float32, got {dtype}."
        )


class GaussianMixture(nn.Module):
    """The exact denoiser of a mixture of isotropic gaussians.

    Attributes:
      means: `[K][D]`; None takes means, std and weights of the data source `mixture`.
      std: of every component, in every direction; None with `means` None.
      weights: `[K]`, positive, in proportion; None is uniform.

    Raises:
      ValueError: the data source knows no components and `means` is None; means, std
        and weights do not fit each other or the data; the precision is not float32.
    """

    spec: DataSpec
    dtype: str
    process: Any
    source: Source
    means: tuple | None = None
    std: float | None = None
    weights: tuple[float, ...] | None = None

    PARAM_AXES = ()

    def __post_init__(self):
        super().__post_init__()
        _check_dtype(self.dtype)
        self._check_means()

    def _check_means(self) -> None:
        if self.means is None:
            for name in ("std", "weights"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: is taken from the data without means.")
            if not hasattr(self.source, "means"):
                raise ValueError(
                    "means: 'gaussian_mixture' needs means and std, or the data "
                    f"source 'mixture'; it is {type(self.source).__name__}."
                )
            return
        size, classes = int(np.prod(self.spec.shape)), self.spec.num_classes
        if not self.means or any(np.size(mean) != size for mean in self.means):
            raise ValueError(
                f"means: expected at least one, of {size} numbers each as the data, "
                f"got {self.means}."
            )
        if self.std is None or self.std <= 0:
            raise ValueError(f"std: must be positive with means, got {self.std}.")
        if classes and classes != len(self.means):
            raise ValueError(f"means: {len(self.means)} of them for {classes} classes.")
        if self.weights is None:
            return
        if len(self.weights) != len(self.means) or min(self.weights) <= 0:
            raise ValueError(
                f"weights: expected {len(self.means)} positive numbers, one for each "
                f"of the means, got {self.weights}."
            )

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        means, std, weights = self._components()
        variances = np.full(means.shape, std**2)
        return _answer(self, z, cond, weights, means, variances)

    def _components(self) -> tuple[np.ndarray, float, np.ndarray]:
        if self.means is None:
            return self.source.means, self.source.std, self.source.weights
        means = np.asarray(self.means, np.float64).reshape(len(self.means), -1)
        share = 1 / len(means)
        weights = self.weights or (share,) * len(means)
        return means, self.std, np.asarray(weights, np.float64)


class Gaussian(nn.Module):
    """The exact denoiser of a gaussian, or of one for each class.

    Without `std` the gaussians are those with the mean and the covariance of the
    training examples (10,000 of them at most, evenly spaced): the best affine denoiser
    of these data.

    Attributes:
      mean, std: of every entry of x, of N(mean, std² I); std None fits the data.
      per_class: fit each class on its own, to a label-conditional denoiser.
      floor: smallest variance along a direction, where the examples have none.

    Raises:
      ValueError: the data have too many dimensions to fit a covariance to, `std` is
        not positive, or the precision is not float32; when traced, no example is of
        some class.
    """

    spec: DataSpec
    dtype: str
    process: Any
    source: Source
    mean: float = 0.0
    std: float | None = None
    per_class: bool = False
    floor: float = 1e-4

    PARAM_AXES = ()

    def __post_init__(self):
        super().__post_init__()
        _check_dtype(self.dtype)
        size = int(np.prod(self.spec.shape))
        if self.std is None and size > _MAX_DIMENSION:
            raise ValueError(
                "std: 'gaussian' fits a covariance to at most "
                f"{_MAX_DIMENSION} dimensions, got {size}; give it a std."
            )
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std: must be positive, got {self.std}.")
        if self.floor < 0:
            raise ValueError(f"floor: must not be negative, got {self.floor}.")

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        size = int(np.prod(z.shape[1:]))
        if self.std is not None:
            mean = np.full((1, size), self.mean)
            return _answer(
                self, z, cond, np.ones(1), mean, np.full_like(mean, self.std**2)
            )
        classes = self.spec.num_classes if self.per_class else 0
        weights, means, variances, bases = fit(self.source, classes)
        variances = np.maximum(variances, self.floor)
        return _answer(self, z, cond, weights, means, variances, jnp.asarray(bases))


@functools.lru_cache(maxsize=4)
def fit(source: Source, num_classes: int):
    """Returns weights `[K]`, means `[K, D]`, variances `[K, D]`, bases `[K, D, D]`.

    Args:
      source: of the examples; those used are evenly spaced, as it may be sorted.
      num_classes: K, one gaussian for each; 0 is a single one for all.

    Raises:
      ValueError: none of the examples is of some class.
    """
    number = min(len(source), _NUM_EXAMPLES)
    examples = [source[i * len(source) // number] for i in range(number)]
    x = np.stack([np.ravel(e["x"]) for e in examples]).astype(np.float64)
    label = (
        np.asarray([e["label"] for e in examples])
        if num_classes
        else np.zeros(len(x), np.int64)
    )
    weights, means, variances, bases = [], [], [], []
    for k in range(max(num_classes, 1)):
        own = x[label == k]
        if not len(own):
            raise ValueError(
                f"config.networks: 'gaussian' with per_class has no example of class "
                f"{k} among {number} of the data; use per_class=False."
            )
        covariance = np.atleast_2d(np.cov(own, rowvar=False, bias=True))
        values, vectors = np.linalg.eigh(covariance)
        weights.append(len(own) / len(x))
        means.append(own.mean(0))
        variances.append(np.maximum(values, 0.0))
        bases.append(vectors)
    return tuple(np.asarray(q, np.float32) for q in (weights, means, variances, bases))
