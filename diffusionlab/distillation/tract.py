"""TRACT: a phase takes a teacher of M steps to a student of N at once.

A step of the student is one of N segments, of M / N fine steps of the teacher. For a
fine step from t to s = t - 1 / M in the segment that starts at b,

    z_s = DDIM_{t->s}(x_T(z_t, t), z_t)
    z_b = DDIM_{s->b}(x_self(z_s, s), z_s),   z_b = z_s where s = b                 (1)
    x~ = inverse DDIM_{t->b}(z_b, z_t)                                              (2)
    loss = weight(t) mean((x_student(z_t, t) - x~)²)                                (3)

where x_self is a quick average of the student. Then the slow average of the student,
which is also what samples, is both the next phase's teacher and its start, and the
optimiser starts afresh. (2) is computed as equation 1 of `fine_steps`.

With N = M, (2) is x_T(z_t, t). Multistep consistency is one phase whose M grows, with a
norm for a loss and the student itself for x_self.

Source: Berthelot et al. 2023 (arXiv 2303.04248), section 3 and appendix.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import jax.numpy as jnp

from diffusionlab.distillation import base, fine_steps
from diffusionlab.types import (
    Array,
    Cond,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Role,
    Teacher,
    Transition,
)

_SEGMENT, _STEP, _NOISE, _NETWORK = range(4)  # one use of the step's key each

AVERAGES = ("main", "self")
"""Of the student: what samples and teaches the next phase, and x_self."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tract:
    """Equation 3 for the role `student`, which starts as the teacher.

    `config.ema` has the averages 'main', slow, and 'self', quick: 0.5 in the source,
    and for 'main' a decay d with d^steps_per_phase = 1e-3. Role `previous` holds the
    average 'main' of the phase before; phase 'first' learns from the run's teacher,
    phase 'later' from `previous`. Both are 5 network evaluations per example of a step:
    the teacher's, x_self, and 3 for the student with its gradient; 'first' is 6 with a
    guided teacher. Guidance is in the student from then on.

    There are as many phases as middle_steps and one more. Until they are over, the
    student makes more steps than `num_steps`, for which it is evaluated. Learning rates
    count the steps of a phase.

    Metrics: 'loss', equation 3, and 'loss_by_logsnr'; 'mse', the squared error of x;
    'teacher_steps' and 'student_steps', M and N of this phase.

    Attributes:
      process, networks, spec: of the student; its network is 'denoiser', and predicts
        x, v, or anything that says x without dividing by alpha.
      teacher: of the first phase.
      num_steps: N of the last phase, at least 1; of the student's sampler.
      teacher_steps: M of the first phase.
      middle_steps: N of the phases before the last one, M of those after the first.
      steps_per_phase: optimiser steps, at least 1.
      guidance_scale: of the teacher; 1 is without.
      weight: 'truncated_snr', the larger of the errors of x and eps, or 'snr+1', the
        error of v.

    Raises:
      ValueError: a field is out of its range; a number of steps does not divide the one
        before; there is no teacher, or none that could be guided; the process predicts
        eps.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    num_steps: int = 1
    teacher_steps: int = 1024
    middle_steps: tuple = (32,)
    steps_per_phase: int = 50_000
    guidance_scale: float = 1.0
    weight: str = "truncated_snr"

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = fine_steps.check_sampler
    transitions = {
        "next": Transition(
            {"previous": "student@main", "student": "student@main"}, ("student",)
        )
    }

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        base.check_at_least(self, 1, "num_steps", "steps_per_phase")
        base.check_word(self, "weight", ("truncated_snr", "snr+1"))
        fine_steps.check_prediction(self)
        for before, after in itertools.pairwise(self.step_counts):
            if after < 1 or before % after:
                raise ValueError(
                    "middle_steps: teacher_steps, middle_steps and num_steps must each "
                    "be a multiple of the next, got "
                    f"{', '.join(map(str, self.step_counts))}."
                )

    @property
    def step_counts(self) -> tuple[int, ...]:
        return (self.teacher_steps, *self.middle_steps, self.num_steps)

    @property
    def roles(self) -> Mapping[str, Role]:
        previous = Role(base.NETWORK, "teacher", trainable=False)
        return {
            "student": Role(base.NETWORK, "teacher", ema=AVERAGES),
            "previous": previous,
        }

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {
            "first": Phase(("student",), self.first_loss),
            "later": Phase(("student",), self.later_loss),
        }

    @property
    def evaluations(self) -> Mapping[str, float]:
        return {"first": 4.0 + base.teacher_evaluations(self), "later": 5.0}

    def phase(self, step: int) -> str:
        """Returns 'first' in the first phase of TRACT and 'later' after it."""
        return "first" if step < self.steps_per_phase else "later"

    def transition(self, step: int) -> str | None:
        """Returns 'next' before the first step of every phase but the first."""
        number, begins = divmod(step, self.steps_per_phase)
        return "next" if not begins and 0 < number <= len(self.middle_steps) else None

    def step_counts_at(self, step: Array) -> tuple[Array, Array]:
        """Returns M and N, int32, at an optimiser step."""
        number = jnp.minimum(step // self.steps_per_phase, len(self.middle_steps))
        counts = jnp.asarray(self.step_counts, jnp.int32)
        return counts[number], counts[number + 1]

    def first_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 with the run's teacher, and its metrics; see `_loss`."""

        def teach(z_t: Array, t: Array, cond: Cond) -> Array:
            return base.teach(self, inputs.params["teacher"], z_t, t, cond).x

        return self._loss(params, inputs, teach)

    def later_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 with the phase before, and its metrics; see `_loss`."""

        def teach(z_t: Array, t: Array, cond: Cond) -> Array:
            return base.apply(self, inputs.params["previous"], z_t, t, cond).x

        return self._loss(params, inputs, teach)

    def target(
        self, params: Params, first: Array, z_t: Array, fine, cond: Cond
    ) -> Array:
        """Returns x~ of equation 2, `[B, ...]`.

        Args:
          params: of x_self.
          first, z_t: `[B, ...]`, the teacher's x at z_t, and z_t.
          fine: the times.
          cond: of the student.
        """

        def answer(z_s: Array, s: Array) -> Array:
            return base.apply(self, params, z_s, s, cond).x

        return fine_steps.followed(self.process, first, z_t, fine, answer)

    def _loss(
        self, params: Mapping[str, Params], inputs: Inputs, teach
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 on a batch, and its metrics; float32.

        Args:
          params: of the student.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
          teach: `teach(z_t, t, cond) -> x`.
        """
        keys = base.split(inputs.key, 4)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        before, number = self.step_counts_at(inputs.step)
        fine = fine_steps.draw(
            [keys[_SEGMENT], keys[_STEP]], x.shape[0], number, before // number
        )
        z_t, _ = self.process.corrupt(keys[_NOISE], x, fine.t)
        first = teach(z_t, fine.t, cond)
        average = inputs.ema["self"]["student"]
        target = self.target(average, first, z_t, fine, cond)
        loss, metrics = fine_steps.squared_loss(
            self, params["student"], target, z_t, fine.t, cond, keys[_NETWORK]
        )
        metrics["teacher_steps"] = fine_steps.count(before)
        metrics["student_steps"] = fine_steps.count(number)
        return loss, metrics
