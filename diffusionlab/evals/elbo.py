"""The bound on -log p of tokens: nats and bits per token, and perplexity.

    -log p(x) <= int_0^1 rate(x, t) dt                                              (1)
                 + prior                                                            (2)
                 + E[-log p(x | z_0)]                                               (3)

with the rate of `objectives/discrete.py`. (2) and (3) are zero where alpha goes from 1
to 0. Where it ends at alpha_1 above 0, (2) is for masked tokens one more step, from all
masked, that reveals each with this probability, and for uniform noise the divergence of
z_1 from it:

    masked    alpha_1 sum_i -log p(x_i | all masked)                                (4)
    uniform   sum_i KL(alpha_1 x_i + (1 - alpha_1) / K || 1 / K)                    (5)

(3) is that of the denoiser at t = 0, of the tokens that are still masked, or of all.

Source: Sahoo et al. 2024, MDLM (arXiv 2406.07524), for the bound of masked tokens;
Schiff et al. 2024, UDLM (arXiv 2412.10193), for that of uniform noise. (4) is the step
of D3PM (arXiv 2107.03006) from alpha = 0, and (3) that to alpha = 1; MD4
(arXiv 2406.04329) has log K for each token in the place of (3), and leaves out (4).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import keys as keys_lib
from diffusionlab import types
from diffusionlab.evals import arrays
from diffusionlab.objectives import discrete, discrete_losses
from diffusionlab.types import Array, CondPredict, Process

_FIRST = 1e-6  # t, of a rate that divides by it
_GOLDEN = 0.6180339887  # its multiples are spread evenly over [0, 1]
_Z = 1.959964  # 97.5 % of a normal variable


@functools.lru_cache(maxsize=16)
def bound(process: Process, num_times: int):
    """Returns `f(predict, x, label, index) -> (diffusion, prior, reconstruction)`.

    All are `[B]` in nats: equations 1 to 3 of tokens x `[B, ...]`. Times are u² with u
    stratified: one in each of `num_times` equal parts of [0, 1], at an offset that each
    example draws for itself. The rate is about 1 / t with probability t, so that its
    variance over t itself would grow without bound. Text in blocks has as many parts of
    [0, 1] in which this is so, and takes several times in each. The noise is that of
    the first `index` of a batch.

    Args:
      process: of the network.
      num_times: network evaluations per example for (1).
    """
    starts_clean = float(process.schedule.noise(0.0)) == 0
    ends_as_noise = float(process.schedule.alpha(1.0)) == 0

    def run(predict: CondPredict, x: Array, label: Array | None, index: Array):
        key = jax.random.fold_in(keys_lib.key(0, "elbo"), index[0])
        # A student with noise of its own draws it anew at each time, as its sampler
        # does: the mean of -log p over it is a bound, too.
        draws = jax.random.split(jax.random.fold_in(key, num_times + 2), len(x))
        cond = {"key": draws} | ({} if label is None else {"label": label})
        plain = lambda z_t, t: predict(z_t, t, cond)  # noqa: E731
        zero = jnp.zeros(len(x))
        offset = jax.random.uniform(jax.random.fold_in(key, 0), zero.shape)
        shift = _GOLDEN if process.num_blocks > 1 else 0.0

        def part(total, i):
            noise = jax.random.fold_in(key, i + 2)
            # Parts that blocks divide would all have the same u by one offset.
            own = (offset + i * shift) % 1
            scaled = process.num_blocks * (i + own) / num_times
            block = jnp.floor(scaled)
            u = scaled - block
            t = (block + jnp.maximum(u**2, _FIRST)) / process.num_blocks
            return total + 2 * u * discrete.nelbo(process, plain, noise, x, t), None

        total, _ = jax.lax.scan(part, zero, jnp.arange(num_times))
        last = zero if ends_as_noise else prior(process, plain, x)
        first = zero
        if not starts_clean:
            z = process.corrupt(jax.random.fold_in(key, 1), x, zero)[0]
            first = _surprise(process, plain, x, z, zero)
        return total / num_times, last, first

    return run


def prior(process: Process, predict: types.Predict, x: Array) -> Array:
    """Returns equation 4 or 5 of tokens x `[B, ...]`: `[B]`, in nats."""
    one = jnp.ones(len(x))
    if not process.is_masked:
        return discrete_losses.prior(process, one) * x[0].size
    z = jnp.full_like(x, process.mask)
    return process.schedule.alpha(one) * _surprise(process, predict, x, z, one)


def _surprise(process, predict, x: Array, z: Array, t: Array) -> Array:
    """Returns -log p(x | z), `[B]`, of the positions where z is noise."""
    logits = predict(z, t).logits
    found = -jnp.take_along_axis(logits, x[..., None], axis=-1)[..., 0]
    return jnp.where(process.is_noise(z), found, 0.0).sum(tuple(range(1, x.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elbo:
    """The bound on held-out examples, unguided; the same noise at every evaluation.

    Numbers, each with the 95 % interval of its Monte-Carlo mean over examples:

      nats_per_token, bits_per_token: of the bound on -log p(x); for data that are
        numbers with levels, `bits_per_dim` in the place of the latter.
      perplexity: exp of nats per token.
      prior, reconstruction: parts of nats_per_token, where alpha does not go from 1
        to 0.

    Attributes:
      num_examples: held-out examples, at most, evenly spaced.
      batch_size: of them at a time.
      num_times: network evaluations per example.
      conditional: on the label; else with the null label, for networks trained on it.
      every: steps between evaluations; 0 is at the end only.

    Raises:
      ValueError: a count is below 1.
    """

    num_examples: int = 1000
    batch_size: int = 100
    num_times: int = 32
    conditional: bool = True
    every: int = 0

    processes = ("categorical",)
    takes_tokens = True

    def __post_init__(self):
        for name in ("num_examples", "batch_size", "num_times"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: must be at least 1, got {getattr(self, name)}."
                )

    @property
    def needs_null_label(self) -> bool:
        """Whether the network must have been trained without labels, too."""
        return not self.conditional

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        process, spec = context.process, context.spec
        test = arrays.spread(context.test, self.num_examples)
        x = np.asarray(process.encode(test["x"]), np.int32)
        label = None
        if spec.num_classes:
            label = np.asarray(test["label"], np.int32)
            if not self.conditional:
                label = np.full_like(label, spec.num_classes)
        parts = self._batches(context, bound(process, self.num_times), x, label)
        size = int(np.prod(spec.shape))
        parts = parts / size
        nats = parts.sum(0)
        mean = float(nats.mean())
        error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
        bits = "bits_per_token" if spec.num_tokens else "bits_per_dim"
        ends = np.array([mean, mean - _Z * error, mean + _Z * error])
        found = {
            "nats_per_token": ends,
            bits: ends / math.log(2),
            "perplexity": np.exp(ends),
        }
        numbers = {name: float(three[0]) for name, three in found.items()}
        for name, part in zip(("prior", "reconstruction"), parts[1:], strict=True):
            if np.any(part):
                numbers[name] = float(part.mean())
        intervals = {}
        if len(nats) > 1:
            intervals = {n: (float(a), float(b)) for n, (_, a, b) in found.items()}
        note = (
            f"{len(x)} held-out examples of {size} tokens out of {process.num_tokens}, "
            f"{self.num_times} times each"
        )
        return types.EvalResult(numbers, {"data": note}, intervals=intervals)

    def _batches(self, context, function, x, label) -> np.ndarray:
        """Parts `[3, N]` float64, in nats, in batches of one size, the last padded."""
        size, found = min(self.batch_size, len(x)), []
        for start in range(0, len(x), size):
            rows = np.minimum(np.arange(start, start + size), len(x) - 1)
            some = None if label is None else label[rows]
            done = context.compute(function, x[rows], some, rows.astype(np.int32))
            found.append(np.asarray(done, np.float64))
        return np.concatenate(found, axis=1)[:, : len(x)]
