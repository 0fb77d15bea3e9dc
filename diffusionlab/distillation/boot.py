"""BOOT: a student of one step, from its teacher's ODE alone, without data.

From noise eps, the path z_t of the teacher's probability flow has the signal y,

    z_t = alpha_t y + sigma_t eps,   dy / dlog(alpha / sigma) = x_hat(z_t, t) - y   (1)

and y at t = 0 is the sample. A student y(eps, t) is its own teacher one step earlier:
with s < t and l = 1 - alpha_t sigma_s / (sigma_t alpha_s),

    loss = mean (y(eps, s) - sg[y(eps, t) + l (x_hat(z_t, t) - y(eps, t))])² / l²   (2)
           + boundary_weight mean (y(eps, 1) - x_hat(eps, 1))²                      (3)

where z_t is made of y(eps, t), and t = 1 where the noise is all there is.

How a student is told t: its input is the same noise for every t, so its network is a
denoiser at t = 1 always, y(eps, t) = x_hat_student(z_1, 1), with z_1 the noise that
sampling starts from, and the logsnr of t is one more number that it is told,
cond['target_logsnr']. What that adds starts at zero, so a student that starts as its
teacher has y(eps, t) = x_hat(eps, 1), and (3) holds from the first step. Sampling asks
for t = 0.

Source: Gu, Zhai, Zhang, Liu and Susskind 2023 (arXiv 2306.05544), equations 8 to 11.
Its step t - s, weights and network input for t are not known to us; these are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, conditions
from diffusionlab.samplers import base as samplers
from diffusionlab.schedules import times
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
    lift,
)

TARGET = "target_logsnr"
"""The entry of cond that tells a student which t is asked for."""

_TIMES, _NOISE, _NETWORK = range(3)  # one use of the step's key each


def signal_step(
    process: Process, y: Array, x_hat: Array, t: Array, s: Array
) -> tuple[Array, Array]:
    """Returns y at s < t by a step of Euler along (1), `[B, ...]`, and l, `[B]`."""
    step = -jnp.expm1(-samplers.half_logsnr_step(process, t, s))
    return y + lift(step, y.ndim) * (x_hat - y), step


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Boot:
    """Equations 2 and 3 for one role, `student`.

    A step takes, per example, the student forward and backward twice (6), at t once
    more without a gradient (1), and the teacher twice (2, or 4 with guidance).

    Of a batch only the labels and the number of examples are used.

    Attributes:
      process: of the teacher; spec: of the data.
      networks: 'denoiser', which has the condition 'target_logsnr'.
      teacher: whose path it is.
      time_step: t - s, in (0, 1]; the smaller, the nearer the ODE and the slower what
        is known at t = 1 gets to t = 0.
      boundary_weight: in (3).
      target_ema: the average in `config.ema` that answers at t; '' is the student.
      guidance_scale: of the teacher; 1 is off.

    Raises:
      ValueError: no teacher, or it cannot be guided; the network has no such condition;
        a number out of range.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    time_step: float = 0.04
    boundary_weight: float = 1.0
    target_ema: str = ""
    guidance_scale: float = 1.0

    samples_from = ("student",)
    roles, phases, phase = base.ROLES, base.phases, base.phase

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        base.check_at_least(self, 0, "boundary_weight")
        if not 0 < self.time_step <= 1:
            raise ValueError(f"time_step: must be in (0, 1], got {self.time_step}.")
        conditions.check(self, TARGET)

    @property
    def evaluations(self) -> Mapping[str, float]:
        return {"train": 7.0 + 2.0 * base.teacher_evaluations(self)}

    def check_sampler(self, sampler: Any) -> None:
        """Raises ValueError unless it makes one step, from t = 1."""
        if sampler.num_steps != 1:
            raise ValueError(f"num_steps: BOOT makes 1 step, not {sampler.num_steps}.")
        start = float(sampler.times(self.process.schedule)[0])
        if start != 1.0:
            raise ValueError(f"grid: BOOT starts at t = 1, and this one at {start:g}.")

    def predict(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> Prediction:
        """Returns the sample at noise z_t as x; it answers at t = 1 whatever t is."""
        one = jnp.ones(z_t.shape[:1])
        return self._signal(params["student"], z_t, jnp.zeros_like(one), cond)

    def _signal(
        self,
        params: Params,
        noise: Array,
        t: Array,
        cond: Cond,
        key: Array | None = None,
    ) -> Prediction:
        """Returns y(eps, t) as x, `[B, ...]`; `noise` is z_1, and t `[B]`."""
        cond = {**cond, TARGET: self.process.schedule.logsnr(t)}
        return base.apply(self, params, noise, jnp.ones_like(t), cond, key)

    def _reference(self, inputs: Inputs) -> Params:
        if not self.target_ema:
            return jax.lax.stop_gradient(inputs.params["student"])
        if self.target_ema not in inputs.ema:
            raise ValueError(
                f"config.objective.target_ema: there is no average '{self.target_ema}' "
                f"in config.ema; there are: {', '.join(inputs.ema) or 'none'}."
            )
        return jax.lax.stop_gradient(inputs.ema[self.target_ema]["student"])

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns (2) + (3) and its metrics; 'loss_by_logsnr' is (2) at s."""
        keys = base.split(inputs.key, 3)
        shape, cond = inputs.batch["x"].shape, base.labels(self, inputs.batch)
        share = times.quantiles(keys[_TIMES], shape[0], True)
        t = self.time_step + (1.0 - self.time_step) * share
        s = jnp.maximum(t - self.time_step, 0.0)
        eps = jax.random.normal(keys[_NOISE], shape, jnp.float32)
        noise, one = self.process.prior_std() * eps, jnp.ones_like(t)

        def ask(params, t):
            return self._signal(params, noise, t, cond, keys[_NETWORK]).x

        def teach(z_t, t):
            return base.teach(self, inputs.params["teacher"], z_t, t, cond).x

        y_t = ask(self._reference(inputs), t)
        taught = teach(self.process.mix(y_t, eps, t), t)
        target, step = signal_step(self.process, y_t, taught, t, s)
        student = params["student"]
        error = base.mean((ask(student, s) - jax.lax.stop_gradient(target)) ** 2)
        error = error / step**2
        first = jax.lax.stop_gradient(teach(noise, one))
        boundary = base.mean((ask(student, one) - first) ** 2)
        loss = error + self.boundary_weight * boundary
        metrics = {
            "loss": base.metric(loss),
            "boundary": base.metric(boundary),
            "loss_by_logsnr": base.by_logsnr(error, self.process, s),
        }
        return loss.mean(), metrics
