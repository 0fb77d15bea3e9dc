"""Reflow: a student learns straight paths between noise and the teacher's samples.

With tau = sigma / (alpha + sigma), the rescaled z' = z_t / (alpha + sigma) goes along a
straight line from data to noise, whatever the process,

    z' = (1 - tau) x + tau eps,   dz' / d tau = u = eps - x                         (1)

and a step of DDIM is exactly a step of Euler's method for it with u_hat = eps_hat -
x_hat. On pairs (eps, x) of noise and the teacher's sample of it, tau uniform between
the ends of the schedule,

    L = E mean |(eps - x) - (eps_hat - x_hat)|²                                     (2)
      = E ((alpha + sigma) / alpha)² mean |eps - eps_hat|²

where the right side is computed, as in `objectives/denoising.py`. The paths of such
pairs cross less than those of independent noise and data, so the flow is straighter and
takes fewer steps; its samples have the law of the teacher's. The straightness is the
least value of (2), and 0 where no paths cross: one step is then exact. To go on, take
the student as teacher of another run. At last the map itself may be learned,

    L = E mean |x - x_hat(z_1, 1)|²,   z_1 the noise that the teacher started from  (3)

for one step; start such a student from one of (2).

Source: Liu, Gong and Liu 2022 (arXiv 2209.03003), equations 1 and 5, theorem 3.3;
Liu et al. 2023, InstaFlow (arXiv 2309.06380), for (3), there with LPIPS, which needs
weights of its own and is left out. In both of them tau is t: alpha = 1 - t, sigma = t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base
from diffusionlab.objectives.denoising import denoising_error
from diffusionlab.objectives.weightings import Weighting
from diffusionlab.samplers import grids
from diffusionlab.types import (
    Array,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Sampler,
    Schedule,
    Teacher,
)

_TIME, _DROPOUT = range(2)  # one use of the step's key each


def straight_time(schedule: Schedule, u: Array) -> Array:
    """Returns t with tau(t) at u `[B]` in [0, 1] of the way from data to noise."""
    low, high = (grids.tau(schedule, t) for t in (0.0, 1.0))
    tau = low + u * (high - low)
    return schedule.inverse(2.0 * (jnp.log1p(-tau) - jnp.log(tau)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reflow:
    """Equation 2, or 3; 3 network evaluations per example and step.

    The pairs cost the teacher's sampler once, before the first step: num_pairs times
    its evaluations, twice that where the teacher is guided. See `pairs.py`.

    Attributes:
      process, networks, spec, teacher: of the experiment.
      sampler: how the teacher's ODE is solved for the pairs; a deterministic one.
      num_pairs: how many are drawn.
      num_steps: of the student, by DDIM; the grid 'straight' has equal steps in tau.
        Training depends on it in mode 'distil' alone, where it is 1.
      mode: 'reflow' for equation 2, 'distil' for 3.
      weighting: factor(t) on the squared eps error in (2); None is that of (2).
      guidance_scale: of the teacher that draws the pairs; 1 is off.

    Raises:
      ValueError: there is no teacher, or it cannot be guided; a number below 1; another
        mode; 'distil' with more than one step.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    sampler: Sampler
    num_pairs: int = 50_000
    num_steps: int = 1
    mode: str = "reflow"
    weighting: Weighting | None = None
    guidance_scale: float = 1.0

    samples_from = ("student",)
    roles, phase = base.ROLES, base.phase
    predict = base.predict_student
    check_sampler = base.check_num_steps
    evaluations = {"train": 3.0}

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        base.check_at_least(self, 1, "num_pairs", "num_steps")
        base.check_word(self, "mode", ("reflow", "distil"))
        if self.mode == "distil" and self.num_steps != 1:
            raise ValueError(
                f"num_steps: mode 'distil' learns one step, got {self.num_steps}; use "
                "1, or mode='reflow'."
            )
        if self.mode == "distil" and self.weighting is not None:
            raise ValueError("weighting: mode 'distil' has one time; leave it out.")

    @property
    def phases(self) -> Mapping[str, Phase]:
        loss = {"reflow": self.straight, "distil": self.one_step}[self.mode]
        return {"train": Phase(("student",), loss)}

    def straight(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 on a batch of pairs, and its metrics.

        The metric 'straightness' is equation 2 whatever the weighting: the mean squared
        distance of the paths from straight lines, which reflow lowers.

        Args:
          params: of the student.
          inputs: batch with 'x' and 'noise' `[B, ...]`, and 'label' with classes.
        """
        keys = base.split(inputs.key, 2)
        x, eps = (inputs.batch[name].astype(jnp.float32) for name in ("x", "noise"))
        schedule = self.process.schedule
        t = straight_time(schedule, jax.random.uniform(keys[_TIME], x.shape[:1]))
        z_t = self.process.mix(x, eps, t)
        cond = base.labels(self, inputs.batch)
        raw = self.networks[base.NETWORK].apply(
            params["student"],
            self.process.network_input(z_t, t),
            base.conditions(self, t, cond),
            train=True,
            key=keys[_DROPOUT],
        )
        error = denoising_error(self.process, x, eps, raw, t)
        bent = straight_factor(schedule, t) * error
        loss = bent if self.weighting is None else self.weighting(schedule, t) * error
        metrics = {
            "loss": base.metric(loss),
            "straightness": base.metric(bent),
            "loss_by_logsnr": base.by_logsnr(loss, self.process, t),
        }
        return loss.mean(), metrics

    def one_step(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 on a batch of pairs, and its metrics; see `straight`.

        'std_ratio' is the deviation of the predictions over that of the samples: below
        1 the student averages what it should tell apart.
        """
        keys = base.split(inputs.key, 2)
        x, eps = (inputs.batch[name].astype(jnp.float32) for name in ("x", "noise"))
        t = jnp.ones(x.shape[:1], jnp.float32)
        z_t = self.process.prior_std(1.0) * eps
        cond = base.labels(self, inputs.batch)
        student = params["student"]
        x_hat = base.apply(self, student, z_t, t, cond, keys[_DROPOUT]).x
        loss = base.mean((x - x_hat) ** 2)
        ratio = jnp.std(x_hat) / jnp.maximum(jnp.std(x), 1e-6)
        metrics = {
            "loss": base.metric(loss),
            "std_ratio": (jax.lax.stop_gradient(ratio), jnp.float32(1)),
        }
        return loss.mean(), metrics


def straight_factor(schedule: Schedule, t: Array) -> Array:
    """Returns ((alpha + sigma) / alpha)² of equation 2, shaped as t."""
    alpha, sigma = schedule.alpha_sigma(t)
    return ((alpha + sigma) / alpha) ** 2
