"""Score identity distillation (SiD): the Fisher divergence, without data.

With z_t from a generator's x, and both answers differentiated through z_t,

    y = x_teacher(z_t, t),   u = y - x_aux(z_t, t)                                  (1)
    L = E mean u (y - x - a u) / sg mean|x - y|                                     (2)

u is proportional to the difference of the scores. At the exact score network
E[u (y - x)] = E[u²] (the score identity), so that the unweighted value of (2) is
(1 - a) E[u²]. a = 1/2 is the plain estimate of E[u²] / 2; larger a, which makes the
value negative, is better in practice, as it counts in that aux is held fixed.

The role `aux` learns the score of the samples, see `fake_score`. The times of (2)
follow sigma / alpha on the grid of EDM, of which the largest noise levels are left out:

    sigma / alpha = (low^(1/7) + w (80^(1/7) - low^(1/7)))^7,  w ~ U(0, max_u)      (3)

with low = 0.002. The paper's factor 100 on the loss is a constant that Adam ignores; it
is left out.

Source: Zhou et al. 2024, SiD (arXiv 2404.04057), equations 13, 23 and 25 and
appendix A; equation 3 as in Karras et al. 2022 (arXiv 2206.00364), equation 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, fake_score, generator
from diffusionlab.schedules.times import quantiles
from diffusionlab.types import (
    Array,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Schedule,
    Teacher,
    Times,
)

_LOW, _HIGH, _RHO = 0.002, 80.0, 7.0
_SMALLEST = 1e-5
"""Below it the size of x - y is not divided out: a sample the teacher keeps."""


def karras_times(key: Array, size: int, schedule: Schedule, max_u: float) -> Array:
    """Returns times of equation 3, `[B]`, within those of the schedule."""
    low, high = _LOW ** (1 / _RHO), _HIGH ** (1 / _RHO)
    u = max_u * quantiles(key, size, stratified=True)
    logsnr = -2.0 * _RHO * jnp.log(low + u * (high - low))
    ends = (schedule.logsnr(jnp.float32(t)) for t in (1.0, 0.0))
    return schedule.inverse(jnp.clip(logsnr, *ends))


def identity_loss(x: Array, taught: Array, learned: Array, alpha: float) -> Array:
    """Returns equation 2 without its denominator, of each example, `[B]`.

    Args:
      x: `[B, ...]` samples.
      taught, learned: `[B, ...]` x of the teacher and of aux at z_t.
      alpha: a.
    """
    u = taught - learned
    return base.mean(u * (taught - x - alpha * u))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoreIdentity:
    """Equation 2: `aux_steps` steps of aux, then one of the student.

    A student of k steps takes k evaluations for its samples and 2 more for the gradient
    of the last of them. Phase 'aux': k + 3. Phase 'student': k + 2, two of the teacher
    (four where it is guided) and two of aux, as each has a gradient to z_t.

    Attributes:
      process, networks, spec, teacher: of the experiment.
      times: law of the noise levels that aux learns.
      num_steps: k; the paper's is 1.
      first_logsnr: noise level that samples start from; the default is sigma / alpha =
        2.5.
      aux_steps: steps of aux for each of the student.
      guidance_scale: of the teacher; aux is not guided. 1 is off.
      alpha: a.
      max_u: of equation 3.

    Raises:
      ValueError: see `fake_score.check`; max_u outside (0, 1].
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    num_steps: int = 1
    first_logsnr: float = -1.8325815
    aux_steps: int = 1
    guidance_scale: float = 1.0
    alpha: float = 1.2
    max_u: float = 0.8

    samples_from = ("student",)
    roles = fake_score.ROLES
    predict = base.predict_student
    check_sampler = generator.check_sampler

    def __post_init__(self):
        fake_score.check(self)
        if not 0 < self.max_u <= 1:
            raise ValueError(f"max_u: must be in (0, 1], got {self.max_u}.")

    @property
    def evaluations(self) -> Mapping[str, float]:
        student = fake_score.student_evaluations(self)
        compared = 2 * base.teacher_evaluations(self) + 2
        return {"aux": self.num_steps + 3.0, "student": student + compared}

    @property
    def phases(self) -> Mapping[str, Phase]:
        return fake_score.phases(self)

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then 'student' for one."""
        return base.turns(step, self.aux_steps)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 for the student, and its metrics.

        Its value says nothing: it is 'surrogate', and 'loss' is the mean square of u
        over that of x - y, which goes to zero.

        Args:
          params: by role.
          inputs: labels of the batch are what is generated.
        """
        keys, fixed = base.split(inputs.key, 4), jax.lax.stop_gradient(inputs.params)
        x, cond = fake_score.samples(
            self, params["student"], keys[0], inputs, dropout=keys[1]
        )
        schedule = self.process.schedule
        t = karras_times(keys[2], x.shape[0], schedule, self.max_u)
        z_t, _ = self.process.corrupt(keys[3], x, t)
        taught = base.teach(self, fixed["teacher"], z_t, t, cond).x
        learned = base.apply(self, fixed["aux"], z_t, t, cond).x
        size = jnp.maximum(base.mean(jnp.abs(x - taught)), _SMALLEST)
        size = jax.lax.stop_gradient(size)
        each = identity_loss(x, taught, learned, self.alpha) / size
        relative = base.mean((learned - taught) ** 2) / size**2
        metrics = {
            "loss": base.metric(jax.lax.stop_gradient(relative)),
            "surrogate": base.metric(jax.lax.stop_gradient(each)),
            **fake_score.report(self, x, taught, learned, t),
        }
        return each.mean(), metrics
