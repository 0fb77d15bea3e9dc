"""Progressive distillation: a student of N steps from a teacher's 2 N, round by round.

In a round of N steps, for a step i of 1 ... N drawn per example, with t = i / N,
m = t - 1 / (2 N), s = t - 1 / N, and the teacher's x_T,

    z_m = DDIM_{t->m}(x_T(z_t, t), z_t),   z_s = DDIM_{m->s}(x_T(z_m, m), z_m)      (1)
    x~ = inverse DDIM_{t->s}(z_s, z_t),    x~ = x_T(z_m, m) for i = 1               (2)
    loss = weight(t) mean((x_student(z_t, t) - x~)²)                                (3)

Then the student is the next round's teacher, the optimiser starts afresh, and N is
halved. (2) is computed as equation 1 of `fine_steps`. With `xvar_frac` both steps of
(1) are those of aDDIM, with xvar = xvar_frac mean((x_T - x)²).

Source: Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2 and section 4; Heek,
Hoogeboom and Salimans 2024 (arXiv 2403.06807) for aDDIM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
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
    Prediction,
    Process,
    Role,
    Teacher,
    Transition,
)

_STEP, _NOISE, _NETWORK = range(3)  # one use of the step's key each


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Progressive:
    """Equation 3 for the role `student`, which starts as the teacher.

    Role `previous` holds the student of the round before; phase 'first' learns from the
    run's teacher, phase 'later' from `previous`. Both are 5 network evaluations per
    example of a step: two of the teacher, and 3 for the student with its gradient;
    'first' is 7 with a guided teacher. Guidance is in the student from then on.

    Training is num_rounds steps_per_round optimiser steps. Until they are over, the
    student makes more steps than `num_steps`, for which it is evaluated. Learning rates
    count the steps of a round.

    Metrics: 'loss', equation 3, and 'loss_by_logsnr'; 'mse', the squared error of x;
    'num_steps', N of this round.

    Attributes:
      process, networks, spec: of the student; its network is 'denoiser', and predicts
        x, v, or anything that says x without dividing by alpha.
      teacher: of the first round.
      num_steps: N of the last round, at least 1; of the student's sampler.
      num_rounds: at least 1; the run's teacher makes num_steps 2^num_rounds steps.
      steps_per_round: optimiser steps, at least 1.
      guidance_scale: of the teacher; 1 is without.
      xvar_frac: share of the teacher's squared error that aDDIM counts as variance; 0
        is DDIM.
      weight: 'truncated_snr', the larger of the errors of x and eps, or 'snr+1', the
        error of v.

    Raises:
      ValueError: a field is out of its range; there is no teacher, or none that could
        be guided; the process predicts eps.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    num_steps: int = 8
    num_rounds: int = 7
    steps_per_round: int = 50_000
    guidance_scale: float = 1.0
    xvar_frac: float = 0.0
    weight: str = "truncated_snr"

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = fine_steps.check_sampler
    transitions = {"halve": Transition({"previous": "student"}, ("student",))}

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        base.check_at_least(self, 1, "num_steps", "num_rounds", "steps_per_round")
        base.check_at_least(self, 0, "xvar_frac")
        base.check_word(self, "weight", ("truncated_snr", "snr+1"))
        fine_steps.check_prediction(self)

    @property
    def roles(self) -> Mapping[str, Role]:
        previous = Role(base.NETWORK, "teacher", trainable=False)
        return {"student": Role(base.NETWORK, "teacher"), "previous": previous}

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {
            "first": Phase(("student",), self.first_loss),
            "later": Phase(("student",), self.later_loss),
        }

    @property
    def evaluations(self) -> Mapping[str, float]:
        taught = 2.0 * base.teacher_evaluations(self)
        return {"first": 3.0 + taught, "later": 5.0}

    def phase(self, step: int) -> str:
        """Returns 'first' in the first round and 'later' after it."""
        return "first" if step < self.steps_per_round else "later"

    def transition(self, step: int) -> str | None:
        """Returns 'halve' before the first step of every round but the first."""
        number, begins = divmod(step, self.steps_per_round)
        return "halve" if not begins and 0 < number < self.num_rounds else None

    def num_steps_at(self, step: Array) -> Array:
        """Returns N, int32, at an optimiser step."""
        number = jnp.minimum(step // self.steps_per_round, self.num_rounds - 1)
        return self.num_steps * 2 ** (self.num_rounds - 1 - number)

    def first_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 with the run's teacher, and its metrics; see `_loss`."""

        def teach(z_t: Array, t: Array, cond: Cond) -> tuple[Prediction, Prediction]:
            taught = inputs.params["teacher"]
            return fine_steps.teach_both(self, taught, z_t, t, cond)

        return self._loss(params, inputs, teach)

    def later_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 with the student before, and its metrics; see `_loss`."""

        def teach(z_t: Array, t: Array, cond: Cond) -> tuple[Prediction, Prediction]:
            found = base.apply(self, inputs.params["previous"], z_t, t, cond)
            return found, found

        return self._loss(params, inputs, teach)

    def target(self, teach, x: Array, z_t: Array, fine, cond: Cond) -> Array:
        """Returns x~ of equation 2, `[B, ...]`.

        Args:
          teach: `teach(z_t, t, cond) -> (guided prediction, that without guidance)`.
          x, z_t: `[B, ...]` data, used by aDDIM alone, and noisy data.
          fine: t, m and s of equation 1 are its t, s and b.
          cond: of the teacher.
        """

        def step(z: Array, t: Array, s: Array) -> Array:
            guided, plain = teach(z, t, cond)
            if not self.xvar_frac:
                return guided.x
            xvar = self.xvar_frac * base.mean((plain.x - x) ** 2)
            return fine_steps.addim_x(self.process, guided, xvar, t, s)

        first = step(z_t, fine.t, fine.s)
        second = lambda z_m, m: step(z_m, m, fine.b)  # noqa: E731
        return fine_steps.followed(self.process, first, z_t, fine, second)

    def _loss(
        self, params: Mapping[str, Params], inputs: Inputs, teach
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 on a batch, and its metrics; float32.

        Args:
          params: of the student.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
          teach: see `target`.
        """
        keys = base.split(inputs.key, 3)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        number = self.num_steps_at(inputs.step)
        segment = jax.random.randint(keys[_STEP], x.shape[:1], 0, number)
        fine = fine_steps.fine_steps(segment, jnp.full_like(segment, 2), number, 2)
        z_t, _ = self.process.corrupt(keys[_NOISE], x, fine.t)
        target = self.target(teach, x, z_t, fine, cond)
        loss, metrics = fine_steps.squared_loss(
            self, params["student"], target, z_t, fine.t, cond, keys[_NETWORK]
        )
        return loss, {**metrics, "num_steps": fine_steps.count(number)}
