"""Self-distillation through time: masked tokens in half the steps, round by round.

In a round of N steps, t being one of its stops, m = t - 1 / (2 N) and s = t - 1 / N,
the teacher takes the two steps of its sampler from z_t to z_m and z_s, each token drawn
of its answer. What it said of a position when that was revealed, or at the last step
where it was not, is what the student is to say of it at once:

    target_i = p_T(x_i | z_t, t) if i is revealed in z_m, else p_T(x_i | z_m, m)    (1)
    loss = sum_{i masked in z_t} KL_i / number of positions                         (2)

KL_i is KL(student, target), 'reverse', or KL(target, student), 'forward'. Then the
student is the next round's teacher, the optimiser starts afresh, and N is halved.

The student still makes each token independently of the others. Of 'forward' the best
is the mean of (1) over the steps drawn, and of an exact teacher that is p_T(x | z_t)
itself: there is nothing to learn. Of 'reverse' it is the normalised geometric mean,
which is surer of what the targets agree on: samples of less entropy.

Source: Deschenaux and Gulcehre 2024 (arXiv 2410.21035), from memory: which KL is
theirs, and their weights, are to be checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, fine_steps
from diffusionlab.distillation.discrete_moment_matching import check_ancestral
from diffusionlab.distillation.progressive import Progressive
from diffusionlab.objectives.discrete import check_sees_all
from diffusionlab.processes.categorical import draw as draw_tokens
from diffusionlab.samplers import grids
from diffusionlab.types import (
    Array,
    CategoricalPrediction,
    Cond,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Process,
    Teacher,
    Transition,
)

_STEP, _NOISE, _TARGET = range(3)  # one use of the step's key each
Answer = Callable[[Array, Array], CategoricalPrediction]


def target(
    process: Process, answer: Answer, key: Array, z_t: Array, stops: list[Array]
) -> Array:
    """Returns log of equation 1, `[B, ..., K]`, for any number of steps.

    Args:
      process: masked.
      answer: `(z, t) -> CategoricalPrediction` of the teacher.
      key: of the tokens drawn.
      z_t: `[B, ...]`.
      stops: t, ..., s, falling, `[B]` each.
    """
    found = None
    for step, (t, s) in enumerate(zip(stops[:-1], stops[1:], strict=True)):
        x_key, step_key = jax.random.split(jax.random.fold_in(key, step))
        said = answer(z_t, t).logits
        hidden = jnp.expand_dims(process.is_noise(z_t), -1)
        found = said if found is None else jnp.where(hidden, said, found)
        z_t = process.step(step_key, draw_tokens(x_key, said), z_t, t, s)
    return found


def divergence(word: str, log_student: Array, log_target: Array) -> Array:
    """Returns KL of each position, `[B, ...]`, of log-probabilities `[B, ..., K]`.

    Args:
      word: 'reverse', KL(student, target), or 'forward', KL(target, student).
    """
    first, second = log_student, log_target
    if word == "forward":
        first, second = second, first
    return (jnp.exp(first) * (first - second)).sum(axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SelfDistillationThroughTime:
    """Equation 2 for the role `student`, which starts as the teacher.

    Role `previous` holds the student of the round before; phase 'first' learns from the
    run's teacher, phase 'later' from `previous`. Both are 5 network evaluations per
    example of a step: two of the teacher, and 3 for the student with its gradient;
    'first' is 7 with a guided teacher. Guidance is in the student from then on.

    Training is num_rounds steps_per_round optimiser steps. Until they are over, the
    student makes more steps than `num_steps`, for which it is evaluated. Learning rates
    count the steps of a round.

    Metrics: 'loss', equation 2 in nats, and 'loss_by_logsnr'; 'entropy' of the student
    in nats, the mean over masked positions; 'num_steps', N of this round.

    Attributes:
      process: categorical, masked.
      networks: has the entry 'denoiser'.
      spec: shape, tokens and classes of the data.
      teacher: of the first round.
      num_steps: N of the last round, at least 1; of the student's sampler.
      num_rounds: at least 1; the run's teacher makes num_steps 2^num_rounds steps.
      steps_per_round: optimiser steps, at least 1.
      guidance_scale: of the teacher; 1 is without.
      divergence: 'reverse' or 'forward'.

    Raises:
      ValueError: a field is out of its range; there is no teacher, or none that could
        be guided; uniform noise; a causal network.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    num_steps: int = 16
    num_rounds: int = 3
    steps_per_round: int = 10_000
    guidance_scale: float = 1.0
    divergence: str = "reverse"

    processes = ("categorical",)
    samples_from = ("student",)
    predict = base.predict_student
    transitions = {"halve": Transition({"previous": "student"}, ("student",))}
    phase, transition = Progressive.phase, Progressive.transition
    num_steps_at, evaluations = Progressive.num_steps_at, Progressive.evaluations
    phases, roles = Progressive.phases, Progressive.roles

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        check_sees_all(self.networks, "self_distillation_through_time")
        base.check_at_least(self, 1, "num_steps", "num_rounds", "steps_per_round")
        base.check_word(self, "divergence", ("reverse", "forward"))
        if not self.process.is_masked:
            raise ValueError(
                "process.noise: self-distillation through time learns of masked "
                "positions, and config.process is uniform; use "
                "'discrete_moment_matching'."
            )
        if self.process.block_length:
            raise ValueError(
                "process.block_length: self-distillation through time learns of all "
                "masked positions at a time; use 'discrete_moment_matching'."
            )

    def check_sampler(self, sampler: Any) -> None:
        """Raises ValueError for a sampler that makes other steps than those trained."""
        base.check_num_steps(self, sampler)
        check_ancestral(self.process, sampler)
        if not isinstance(sampler.grid or grids.Uniform(), grids.Uniform):
            raise ValueError(
                "grid: this student makes equal steps of t, and no others; leave it "
                "out."
            )

    def first_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 with the run's teacher, and its metrics; see `_loss`."""

        def teach(z_t: Array, t: Array, cond: Cond) -> CategoricalPrediction:
            return base.teach(self, inputs.params["teacher"], z_t, t, cond)

        return self._loss(params, inputs, teach)

    def later_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 with the student before, and its metrics; see `_loss`."""

        def teach(z_t: Array, t: Array, cond: Cond) -> CategoricalPrediction:
            return base.apply(self, inputs.params["previous"], z_t, t, cond)

        return self._loss(params, inputs, teach)

    def _loss(
        self, params: Mapping[str, Params], inputs: Inputs, teach
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 on a batch, and its metrics; float32.

        Args:
          params: of the student.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
          teach: `(z_t, t, cond) -> CategoricalPrediction`.
        """
        keys, process = base.split(inputs.key, 3), self.process
        x, cond = process.encode(inputs.batch["x"]), base.labels(self, inputs.batch)
        number = self.num_steps_at(inputs.step)
        segment = jax.random.randint(keys[_STEP], x.shape[:1], 0, number)
        t, m, s = ((segment + part) / number for part in (1.0, 0.5, 0.0))
        z_t, _ = process.corrupt(keys[_NOISE], x, t)
        answer = lambda z, t: teach(z, t, cond)  # noqa: E731
        wanted = target(process, answer, keys[_TARGET], z_t, [t, m, s])
        found = base.apply(self, params["student"], z_t, t, cond).logits
        hidden = process.is_noise(z_t)
        apart = divergence(self.divergence, found, jax.lax.stop_gradient(wanted))
        loss = base.total(hidden * apart) / z_t[0].size
        entropy = -(jnp.exp(found) * found).sum(axis=-1)
        return loss.mean(), {
            "loss": base.metric(loss),
            "loss_by_logsnr": base.by_logsnr(loss, process, t),
            "entropy": ((hidden * entropy).sum(), hidden.sum().astype(jnp.float32)),
            "num_steps": fine_steps.count(number),
        }
