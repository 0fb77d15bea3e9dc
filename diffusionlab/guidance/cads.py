"""Condition-annealed sampling: noise on the label that fades as sampling goes on.

    gamma(t) = 1 for t <= tau_1, 0 for t >= tau_2, linear in between                (1)
    e_1 = sqrt(gamma) e + s sqrt(1 - gamma) n,   n ~ N(0, I)                        (2)
    e_2 = (e_1 - mean(e_1)) / std(e_1) std(e) + mean(e)                             (3)
    result = psi e_2 + (1 - psi) e_1                                                (4)

e is the embedding of one example's label, mean and std are over its entries. Samples of
one class then differ more: early steps see little of the class.

Source: Sadat et al. 2023 (arXiv 2310.17347), section 3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.types import (
    Array,
    Cond,
    CondPredict,
    DataSpec,
    Prediction,
    Process,
)

# Samplers fold small numbers into a sample's key; this is none of them.
_USE = 0xFFFFFFFF


class Uses:
    """How many networks have applied the noise while they were traced."""

    def __init__(self):
        self.count = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """Equations 2 to 4: `cond['label_noise']`, which the embedding of a label applies.

    Attributes:
      keys: `[B]`, one random key per example.
      keep: `[B]`, gamma.
      noise_scale: s.
      rescale: psi.
      uses: notes that it was applied.
    """

    keys: Array
    keep: Array
    noise_scale: float = dataclasses.field(metadata=dict(static=True))
    rescale: float = dataclasses.field(metadata=dict(static=True))
    uses: Uses = dataclasses.field(metadata=dict(static=True))

    def __call__(self, embedding: Array, is_null: Array) -> Array:
        """Returns the corrupted embedding of the labels, `[B, width]`.

        Args:
          embedding: `[B, width]`.
          is_null: `[B]`; the embedding of the null class stays as it is.
        """
        self.uses.count += 1
        e = embedding.astype(jnp.float32)
        draw = lambda key: jax.random.normal(key, e.shape[1:], jnp.float32)  # noqa: E731
        keep = self.keep[:, None]
        noisy = jnp.sqrt(keep) * e
        noisy += self.noise_scale * jnp.sqrt(1.0 - keep) * jax.vmap(draw)(self.keys)
        mean, std = e.mean(1, keepdims=True), e.std(1, keepdims=True)
        centred = noisy - noisy.mean(1, keepdims=True)
        unit = centred / jnp.maximum(noisy.std(1, keepdims=True), 1e-12)
        noisy = self.rescale * (unit * std + mean) + (1.0 - self.rescale) * noisy
        clean = is_null[:, None] | (keep == 1.0)
        return jnp.where(clean, e, noisy).astype(embedding.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cads:
    """Equations 1 to 4 on the label of a network that embeds it by `layers.Embedding`.

    The noise of an example is a function of its key, `cond['key']`, and of t: fresh at
    every time, and the same where a sampler returns to one. So a method with several
    evaluations per step sees fresh noise at each of them, and no adaptive one can
    control its error: config.sampler must say its number of steps. No network
    evaluations.

    Attributes:
      noise_scale: s; 0 returns `predict` itself.
      tau_1, tau_2: times between which the label fades in, 0 <= tau_1 < tau_2.
      rescale: psi, in [0, 1].

    Raises:
      ValueError: a value outside its range.
    """

    noise_scale: float = 0.25
    tau_1: float = 0.6
    tau_2: float = 0.9
    rescale: float = 1.0

    corrupts_labels = True

    @property
    def off(self) -> bool:
        """Whether it returns `predict` itself."""
        return not self.noise_scale

    def __post_init__(self):
        if self.noise_scale < 0:
            raise ValueError(
                f"noise_scale: must be at least 0, got {self.noise_scale}."
            )
        if not 0 <= self.tau_1 < self.tau_2:
            raise ValueError(
                f"tau_1: must be in [0, tau_2 = {self.tau_2}), got {self.tau_1}."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale: must be in [0, 1], got {self.rescale}.")

    def keep(self, t: Array) -> Array:
        """Returns gamma of equation 1, shaped as t."""
        return jnp.clip((self.tau_2 - t) / (self.tau_2 - self.tau_1), 0.0, 1.0)

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict:
        """Returns `predict` with noise on the label; its cond has 'label' and 'key'.

        Raises:
          ValueError: the data have no classes; when traced, cond has no 'key'.
        """
        if self.off:
            return predict
        if not spec.num_classes:
            raise ValueError(
                f"noise_scale: {self.noise_scale} needs labels, and the data have no "
                "classes; use 0."
            )

        def annealed(z_t: Array, t: Array, cond: Cond) -> Prediction:
            if "key" not in cond:
                raise ValueError(
                    "config.guidance.cads: needs the keys of the samples as "
                    "cond['key'], and got none."
                )
            t_each = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z_t.shape[:1])
            bits = jax.lax.bitcast_convert_type(t_each, jnp.uint32)
            fold = jax.vmap(jax.random.fold_in)
            own = fold(cond["key"], jnp.full_like(bits, _USE))
            noise = LabelNoise(
                keys=fold(own, bits),
                keep=self.keep(t_each),
                noise_scale=self.noise_scale,
                rescale=self.rescale,
                uses=Uses(),
            )
            return predict(z_t, t, {**cond, "label_noise": noise})

        return annealed
