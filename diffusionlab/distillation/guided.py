"""Guided distillation: one call of the student is two of a guided teacher.

    loss = E_{w, t, x} omega(t) mean (x_student(z_t, t, w, c) - x_w)²
    x_w = x_hat(z_t, t, null) + w (x_hat(z_t, t, c) - x_hat(z_t, t, null))          (1)

with w ~ U[min_guidance_scale, max_guidance_scale], 1 being no guidance (the paper's w
is ours minus 1), told to the network as cond['guidance_scale']. omega is SNR + 1, or
max(SNR, 1). At one z_t an error of x is sigma / alpha times one of eps, so that

    SNR mean dx² = mean deps²                                                       (2)

and no weight ever overflows.

This is the first stage. The second one, fewer steps, is any method with this student's
run as its teacher, `progressive` in the paper: a teacher told no w takes
`sample_guidance_scale`, and its student's network is told the same. Two things of the
paper are not here: there w is drawn in the second stage, too, and stays an input of the
few-step student, where ours is fixed; and its stochastic N-step sampler.

Source: Meng et al. 2023 (arXiv 2210.03142), section 3.1 and appendix B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, conditions
from diffusionlab.guidance import base as guidance
from diffusionlab.types import (
    Array,
    Cond,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Prediction,
    Process,
    Teacher,
    Times,
    lift,
)

SCALE = "guidance_scale"
"""The entry of cond that is w, `[B]`."""

_TIMES, _NOISE, _SCALE, _NETWORK = range(4)  # one use of the step's key each


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Guided:
    """Equation 1 for one role, `student`.

    A step takes, per example, the student forward and backward (3), and the teacher
    with the label and without (2).

    Attributes:
      process: of the teacher; spec: of the data, which have classes.
      networks: 'denoiser', which has the condition 'guidance_scale'.
      teacher: trained with labels and without.
      times: law of t.
      min_guidance_scale, max_guidance_scale: ends of the law of w; 1 is no guidance.
        The paper's are 1 and 5 for pixels, 3 and 15 for latents.
      sample_guidance_scale: w where nobody says, as in sampling.
      truncated_snr: omega = max(SNR, 1) instead of SNR + 1.

    Raises:
      ValueError: no teacher, or one without a null label; data without classes; the
        network has no such condition; the scales are not in order.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    min_guidance_scale: float = 1.0
    max_guidance_scale: float = 5.0
    sample_guidance_scale: float = 2.0
    truncated_snr: bool = False

    samples_from = ("student",)
    roles, phases, phase = base.ROLES, base.phases, base.phase
    evaluations = {"train": 5.0}

    def __post_init__(self):
        base.require_teacher(self.teacher)
        if not self.teacher.has_null_label:
            raise ValueError(
                "max_guidance_scale: guidance needs a teacher that was trained with "
                "labels and without (objective.label_dropout above 0)."
            )
        low, high = self.min_guidance_scale, self.max_guidance_scale
        if not low <= self.sample_guidance_scale <= high:
            raise ValueError(
                "sample_guidance_scale: must be between min_guidance_scale and "
                f"max_guidance_scale, {low} and {high}, got "
                f"{self.sample_guidance_scale}."
            )
        conditions.check(self, SCALE)

    @property
    def cond(self) -> Mapping[str, float]:
        """What the network is told where nobody says otherwise."""
        return {SCALE: float(self.sample_guidance_scale)}

    def predict(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> Prediction:
        """Returns the guided prediction; cond may have 'guidance_scale' `[B]`."""
        told = jnp.full(z_t.shape[:1], self.sample_guidance_scale, jnp.float32)
        cond = {SCALE: told, **cond}
        return base.apply(self, params["student"], z_t, t, cond)

    def target(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond, w: Array
    ) -> Prediction:
        """Returns x_w of equation 1 and its eps, for w `[B]`.

        Args:
          params: of the teacher, by role.
        """
        null = guidance.with_null_label(cond, self.spec)
        twice = jax.tree.map(lambda *pair: jnp.concatenate(pair), cond, null)
        both = self.teacher.predict(
            params, jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), twice
        )
        size = z_t.shape[0]

        def extrapolated(found: Array) -> Array:
            told, untold = found[:size], found[size:]
            return untold + lift(w, told.ndim) * (told - untold)

        return jax.lax.stop_gradient(Prediction(*map(extrapolated, both)))

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 and its metrics; 'mse' is mean dx²."""
        keys = base.split(inputs.key, 4)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        size = x.shape[0]
        t, weight = self.times.sample(keys[_TIMES], size, self.process.schedule)
        low, high = self.min_guidance_scale, self.max_guidance_scale
        w = jax.random.uniform(keys[_SCALE], (size,), minval=low, maxval=high)
        z_t, _ = self.process.corrupt(keys[_NOISE], x, t)
        target = self.target(inputs.params["teacher"], z_t, t, cond, w)
        told = {**cond, SCALE: w}
        found = base.apply(self, params["student"], z_t, t, told, keys[_NETWORK])
        of_x, of_eps = (
            base.mean((a - b) ** 2) for a, b in zip(found, target, strict=True)
        )
        omega = jnp.maximum(of_x, of_eps) if self.truncated_snr else of_x + of_eps
        loss = weight * omega
        metrics = {
            "loss": base.metric(loss),
            "mse": base.metric(of_x),
            "loss_by_logsnr": base.by_logsnr(loss, self.process, t),
        }
        return loss.mean(), metrics
