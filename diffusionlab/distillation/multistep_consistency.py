"""Multistep consistency models: DDIM in k steps, each a consistency model of its own.

Time is cut into k equal segments. A student f, which predicts x, learns to step from
any t of a segment to its start b with a single step of DDIM. With n fine steps in each
segment, n (k n = T) growing with training, t is drawn from the grid of T times, s is
the fine step before it, and

    z_t = alpha_t x + sigma_t eps
    z_s = aDDIM_{t->s}(x_T, z_t),   xvar = xvar_frac mean((x_c - x)²)               (1)
    target = inverse DDIM_{t->b}( DDIM_{s->b}( f(z_s, s), z_s ), z_t )              (2)
    loss = weight(t) ( sqrt(mean((f(z_t, t) - target)²) + huber_epsilon²)
                       - huber_epsilon )                                            (3)

In distillation x_T is the guided teacher's prediction and x_c the teacher's without
guidance; in training x_T = x and xvar = 0. Where s = b, (2) is what leads from z_t to
z_s, whatever the student says: there it learns from the teacher, everywhere else from
itself. (2) is computed as equation 1 of `fine_steps`; no gradient flows into it. f
jumps at the start of a segment, which is why t lies on a grid.

Samples are made by plain DDIM in k equal steps: the student has learned where aDDIM
leads. k = 1 is a consistency model; k = T is a denoiser.

Source: Heek, Hoogeboom and Salimans 2024 (arXiv 2403.06807), algorithms 1 and 2. Their
algorithm leaves xvar_frac out of (1) and their appendix has it. They call the loss a
norm weighted by SNR + 1; the norm of the error of v is that of x times the square root
of SNR + 1, which is the default here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, fine_steps
from diffusionlab.objectives.denoising import pool
from diffusionlab.types import (
    Array,
    Cond,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Process,
    Teacher,
)

_SEGMENT, _STEP, _NOISE, _NETWORK = range(4)  # one use of the step's key each

REDUCTIONS = {
    "mean": lambda square, huber: huber(base.mean(square)),
    "sum": lambda square, huber: huber(base.total(square)),
    "elementwise": lambda square, huber: base.mean(huber(square)),
}
"""(squared errors `[B, ...]`, the Huber function) -> `[B]`."""


def pseudo_huber(square: Array, epsilon: float) -> Array:
    """Returns sqrt(square + epsilon²) - epsilon, without cancellation, epsilon > 0."""
    return square / (jnp.sqrt(square + epsilon**2) + epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MultistepConsistency:
    """Equation 3 for the role `student`, which starts as the teacher.

    5 network evaluations per example of a step: the teacher's at z_t, the student's at
    z_s, and 3 for the student at z_t with its gradient; 6 with a guided teacher, and 4
    in training, which asks no teacher.

    Metrics: 'loss', equation 3; 'mse', the squared error of x, and 'loss_by_logsnr';
    'teacher_steps', T of this step; 'teacher_mse', mean((x_c - x)²).

    Attributes:
      process, networks, spec: of the student; its network is 'denoiser'.
      teacher: may be None in training.
      num_steps: k, of the student's sampler, at least 1.
      first_teacher_steps, last_teacher_steps: T at the start of training and from
        `anneal_steps` on, before k n is made of it; geometric in between. Equal numbers
        are a constant T.
      anneal_steps: optimiser steps, at least 1.
      mode: 'distillation' or 'training'.
      guidance_scale: of the teacher; 1 is without.
      xvar_frac: share of the teacher's squared error that aDDIM counts as variance; 0
        is DDIM.
      huber_epsilon: where (3) turns from a square into a norm, above 0: 1e-4 is all but
        a norm, 1 for data in [-1, 1] all but a square.
      reduction: over the entries of an example: 'mean' as in (3), 'sum' in its place,
        or 'elementwise', the mean of (3) over the entries.
      weight: 'sqrt(snr+1)' or 'snr+1'.
      scales: sides to which the errors of square images are average-pooled; (3) is then
        the sum over sides of that of the pooled error over the side. Empty is the error
        itself.

    Raises:
      ValueError: a field is out of its range; there is no teacher to distil, or none
        that could be guided; scales do not divide the side of square images.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    num_steps: int = 8
    first_teacher_steps: int = 64
    last_teacher_steps: int = 1280
    anneal_steps: int = 100_000
    mode: str = "distillation"
    guidance_scale: float = 1.0
    xvar_frac: float = 0.75
    huber_epsilon: float = 1e-4
    reduction: str = "mean"
    weight: str = "sqrt(snr+1)"
    scales: tuple = ()

    samples_from = ("student",)
    roles, phases, phase = base.ROLES, base.phases, base.phase
    predict = base.predict_student
    check_sampler = fine_steps.check_sampler

    def __post_init__(self):
        base.check_word(self, "mode", ("distillation", "training"))
        base.check_word(self, "reduction", tuple(REDUCTIONS))
        base.check_word(self, "weight", ("sqrt(snr+1)", "snr+1"))
        if self.mode == "distillation":
            base.require_teacher(self.teacher)
            base.check_guidance(self)
        elif self.guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} is of the teacher, and mode "
                "'training' asks none; use 1, or mode 'distillation'."
            )
        counts = ("num_steps", "first_teacher_steps", "last_teacher_steps")
        base.check_at_least(self, 1, *counts, "anneal_steps")
        base.check_at_least(self, 0, "xvar_frac")
        if self.huber_epsilon <= 0:
            raise ValueError(
                f"huber_epsilon: must be positive, got {self.huber_epsilon}."
            )
        shape = self.spec.shape
        if self.scales and (len(shape) < 3 or shape[-3] != shape[-2]):
            raise ValueError(f"scales: need square images, got data of shape {shape}.")
        if any(side < 1 or shape[-2] % side for side in self.scales):
            raise ValueError(
                f"scales: expected divisors of the side {shape[-2]}, got "
                f"{tuple(self.scales)}."
            )

    @property
    def evaluations(self) -> Mapping[str, float]:
        calls = 0.0 if self.mode == "training" else 1.0
        return {"train": 4.0 + calls * base.teacher_evaluations(self)}

    def steps_per_segment(self, step: Array) -> Array:
        """Returns n, int32, at an optimiser step: at least 1, and T = k n."""
        fraction = jnp.clip(step / self.anneal_steps, 0.0, 1.0)
        first, last = self.first_teacher_steps, self.last_teacher_steps
        wanted = first * jnp.exp(fraction * jnp.log(last / first))
        number = jnp.round(wanted / self.num_steps).astype(jnp.int32)
        return jnp.maximum(number, 1)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 on a batch, and its metrics; float32.

        Args:
          params: of the student.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
        """
        keys = base.split(inputs.key, 4)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        each = self.steps_per_segment(inputs.step)
        fine = fine_steps.draw(
            [keys[_SEGMENT], keys[_STEP]], x.shape[0], self.num_steps, each
        )
        z_t, eps = self.process.corrupt(keys[_NOISE], x, fine.t)
        # The same dropout in both passes of the student.
        dropout = keys[_NETWORK]
        first, teacher_mse = self.taught(inputs.params, x, eps, z_t, fine, cond)
        target = self.target(inputs.params["student"], first, z_t, fine, cond, dropout)
        found = base.apply(self, params["student"], z_t, fine.t, cond, dropout).x
        error = found - jax.lax.stop_gradient(target)
        factor = fine_steps.weight(self.weight, self.process.schedule, fine.t)
        loss = factor * self.norm(error)
        metrics = {
            "loss": base.metric(loss),
            "loss_by_logsnr": base.by_logsnr(loss, self.process, fine.t),
            "mse": base.metric(base.mean(error**2)),
            "teacher_mse": base.metric(teacher_mse),
            "teacher_steps": fine_steps.count(each * self.num_steps),
        }
        return loss.mean(), metrics

    def taught(
        self,
        params: Mapping[str, Params],
        x: Array,
        eps: Array,
        z_t: Array,
        fine: fine_steps.Fine,
        cond: Cond,
    ) -> tuple[Array, Array]:
        """Returns the x with which DDIM makes (1), and the teacher's squared error.

        Args:
          params: of all roles.
          x, eps, z_t: `[B, ...]`.
          fine: t and s.
          cond: of the teacher.
        """
        if self.mode == "training":
            return x, jnp.zeros(x.shape[:1])
        guided, plain = fine_steps.teach_both(
            self, params["teacher"], z_t, fine.t, cond
        )
        square = base.mean((plain.x - x) ** 2)
        xvar = self.xvar_frac * square
        return fine_steps.addim_x(self.process, guided, xvar, fine.t, fine.s), square

    def target(
        self,
        params: Params,
        first: Array,
        z_t: Array,
        fine: fine_steps.Fine,
        cond: Cond,
        key: Array | None = None,
    ) -> Array:
        """Returns equation 2, `[B, ...]`.

        Args:
          params: of the student.
          first: `[B, ...]`, the x of the step from t to s.
          z_t: `[B, ...]`.
          fine: the times.
          cond: of the student.
          key: of dropout.
        """

        def answer(z_s: Array, s: Array) -> Array:
            return base.apply(self, params, z_s, s, cond, key).x

        return fine_steps.followed(self.process, first, z_t, fine, answer)

    def norm(self, error: Array) -> Array:
        """Returns the Huber function of errors `[B, ...]` of x, `[B]`; see `scales`."""
        reduce = REDUCTIONS[self.reduction]

        def one(error: Array) -> Array:
            return reduce(error**2, lambda m: pseudo_huber(m, self.huber_epsilon))

        if not self.scales:
            return one(error)
        return sum(one(pool(error, side)) / side for side in self.scales)
