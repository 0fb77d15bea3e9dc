"""Consistency models: one network answers where the probability flow ends.

A consistency function f is the same along a path of the probability-flow ODE and ends
at the data, f(z_0, 0) = z_0. With S = sigma / alpha, y = z / alpha and neighbouring
levels S_t > S_s (`levels.py`),

    loss = w d(f(z_t, t), sg f_(z_s, s)),   w = 1 or 1 / (S_t - S_s)                (1)
    distillation: z_s = one step of the teacher's ODE from z_t, by DDIM or by Heun
    training:     z_s = alpha_s x + sigma_s eps, with the x and eps of z_t          (2)
    d = mean u², or sqrt(sum u² + h²) - h with h = huber_scale sqrt(d)              (3)

f_ is the student itself, or an average of it. At s = 0 the target is z_0 itself.

The boundary is exact for every kind of prediction: S_0 being the schedule's level at
t = 0, d the standard deviation of the data and q = S_0 / S,

    f = c_skip y + (1 - q) (x_hat - c_skip|_{S_0 = 0} y),                           (4)
    c_skip = d² / ((S - S_0)² + d²)

which is z_0 / alpha_0 at t = 0. It is EDM's c_skip y + c_out F with its F read off
x_hat, c_out = d (S - S_0) / sqrt(S² + d²); (4) differs from x_hat by O(q), so a student
starts as its teacher.

Source: Song, Dhariwal, Chen and Sutskever 2023 (arXiv 2303.01469), algorithms 2 and 3
and appendix C; Song and Dhariwal 2023 (arXiv 2310.14189) for (3), the weight and the
target without an average; Geng et al. 2024 (arXiv 2406.14548) for the start from a
diffusion model and for pairs by ratio. LPIPS as d needs weights and is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, levels
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers import grids
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

_LEVELS, _NOISE, _NETWORK = range(3)  # one use of the step's key each


def with_boundary(
    process: Process, prediction: Prediction, z_t: Array, t: Array
) -> Prediction:
    """Returns equation 4 as (x, eps), each `[B, ...]`, for t `[B]` in [0, 1]."""
    schedule = process.schedule
    logsnr, cleanest = schedule.logsnr(t), schedule.logsnr(jnp.float32(0.0))
    alpha, _ = schedule.alpha_sigma(t)
    square, noise = process.sigma_data**2, jnp.exp(-0.5 * logsnr)
    share = jnp.exp(0.5 * (logsnr - cleanest))
    keep = -jnp.expm1(0.5 * (logsnr - cleanest))
    skip = square / ((noise * keep) ** 2 + square) - keep * square / (noise**2 + square)
    q = lambda value: lift(value, z_t.ndim)  # noqa: E731
    return Prediction(
        q(keep) * prediction.x + q(skip / alpha) * z_t,
        q(keep) * prediction.eps + q((share - skip) / (noise * alpha)) * z_t,
    )


def answer(
    objective: Any,
    params: Params,
    z_t: Array,
    t: Array,
    cond: Cond,
    key: Array | None = None,
) -> Prediction:
    """Returns f of equation 4 and its eps; `params` are those of the student."""
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z_t.shape[:1])
    prediction = base.apply(objective, params, z_t, t, cond, key)
    return with_boundary(objective.process, prediction, z_t, t)


def predict(objective, params, z_t: Array, t: Array, cond: Cond) -> Prediction:
    """Returns what the student answers, for parameters by role."""
    return answer(objective, params["student"], z_t, t, cond)


def teacher_step(
    objective: Any, params: Mapping[str, Params], z_t: Array, t: Array, s: Array, cond
) -> Array:
    """Returns z_s `[B, ...]` on the teacher's path; the clean data at s = 0.

    Args:
      objective: `solver` is 'ddim', or 'heun', which averages the noise at both ends.
      params: of the teacher, by role.
    """
    process = objective.process
    first = base.teach(objective, params, z_t, t, cond)
    z_s = base.ddim(process, first.x, z_t, t, s)
    if objective.solver == "ddim":
        return z_s
    clean = samplers.is_last(s)
    until = jnp.where(clean, t, s)
    second = base.teach(objective, params, z_s, until, cond)
    _, sigma = process.schedule.alpha_sigma(until)
    span = -sigma * jnp.expm1(samplers.half_logsnr_step(process, t, until))
    return z_s + lift(0.5 * span, z_t.ndim) * (second.eps - first.eps)


def distance(objective: Any, u: Array) -> Array:
    """Returns d of equation 3, `[B]`, of differences u `[B, ...]`."""
    if not objective.huber_scale:
        return base.mean(u**2)
    square = objective.huber_scale**2 * u[0].size
    return jnp.sqrt(base.total(u**2) + square) - jnp.sqrt(square)


def matched(
    objective: Any,
    params: Params,
    inputs: Inputs,
    pair: tuple[Array, Array, Array, Array],
    cond: Cond,
    key: Array | None,
) -> tuple[Array, Metrics]:
    """Returns equation 1 and its metrics.

    Args:
      params: of the student; gradients flow into them alone.
      pair: z_t, t, z_s and s.
      key: of dropout, the same for both sides.

    Raises:
      ValueError: there is no average `target_ema`.
    """
    z_t, t, z_s, s = pair
    clean, frozen = samplers.is_last(s), _reference(objective, inputs)
    # A schedule without an end has no logsnr at t = 0.
    until = jnp.where(clean, t, s)
    reference = answer(objective, frozen, z_s, until, cond, key).x
    target = jnp.where(lift(clean, z_s.ndim), z_s, reference)
    u = answer(objective, params, z_t, t, cond, key).x - jax.lax.stop_gradient(target)
    loss, process = distance(objective, u), objective.process
    if objective.gap_weight:
        loss = loss / levels.gap(process.schedule, t, s)
    square = base.mean(u**2)
    metrics = {
        "loss": base.metric(loss),
        "mse": base.metric(square),
        "loss_by_logsnr": base.by_logsnr(loss, process, t),
        "mse_by_logsnr": base.by_logsnr(square, process, t),
    }
    return loss.mean(), metrics


def _reference(objective: Any, inputs: Inputs) -> Params:
    name = objective.target_ema
    if not name:
        return jax.lax.stop_gradient(inputs.params["student"])
    if name not in inputs.ema:
        raise ValueError(
            f"config.objective.target_ema: there is no average '{name}' in config.ema; "
            f"there are: {', '.join(inputs.ema) or 'none'}."
        )
    return jax.lax.stop_gradient(inputs.ema[name]["student"])


def _check(objective: Any) -> None:
    base.check_at_least(objective, 0, "huber_scale")
    if objective.level_std <= 0:
        raise ValueError(f"level_std: must be positive, got {objective.level_std}.")


def _table(objective: Any, counts: tuple[int, ...]) -> levels.Table:
    return levels.table(
        objective.process.schedule,
        objective.grid,
        counts,
        objective.level_mean,
        objective.level_std,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConsistencyDistillation:
    """Equation 1 along the teacher's ODE, for one role, `student`.

    A step takes, per example, the student forward and backward (3), its target (1), and
    the teacher once ('ddim') or twice ('heun'), each of these doubled by guidance.

    Attributes:
      process: of the teacher; networks: 'denoiser'; spec: of the data.
      teacher: whose ODE it is.
      grid: of the levels; None is EDM's, `rho`. Sampling starts at its first one.
      num_levels: how many, N of `levels.py`.
      level_mean, level_std: of equation 1 there; None is every level alike.
      solver: 'heun' or 'ddim', Euler's.
      huber_scale: h / sqrt(d) of equation 3; 0 is the mean square.
      gap_weight: the weight 1 / (S_t - S_s) instead of 1.
      target_ema: the average in `config.ema` that is f_; '' is the student itself.
      guidance_scale: of the teacher; 1 is off.

    Raises:
      ValueError: no teacher, or it cannot be guided; another solver; a number out of
        range.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    grid: grids.Grid | None = None
    num_levels: int = 18
    level_mean: float | None = None
    level_std: float = 2.0
    solver: str = "heun"
    huber_scale: float = 0.0
    gap_weight: bool = False
    target_ema: str = ""
    guidance_scale: float = 1.0

    samples_from = ("student",)
    roles, phases, phase = base.ROLES, base.phases, base.phase
    predict = predict

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        base.check_at_least(self, 1, "num_levels")
        _check(self)
        if self.solver not in ("heun", "ddim"):
            raise ValueError(f"solver: expected heun or ddim, got {self.solver!r}.")
        _table(self, (self.num_levels,))

    @property
    def evaluations(self) -> Mapping[str, float]:
        calls = 2.0 if self.solver == "heun" else 1.0
        return {"train": 4.0 + calls * base.teacher_evaluations(self)}

    def check_sampler(self, sampler: Any) -> None:
        """Raises ValueError unless it is for consistency models, from a trained t."""
        base.check_consistency(sampler)
        first = float(_table(self, (self.num_levels,)).stops[0, 0])
        levels.check_start(self, sampler, first)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 and its metrics; 'mse' is mean u² without the weight."""
        keys = base.split(inputs.key, 3)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        found = _table(self, (self.num_levels,))
        t, s = levels.draw(keys[_LEVELS], x.shape[0], found, 0)
        z_t, _ = self.process.corrupt(keys[_NOISE], x, t)
        z_s = teacher_step(self, inputs.params["teacher"], z_t, t, s, cond)
        pair = z_t, t, jax.lax.stop_gradient(z_s), s
        return matched(self, params["student"], inputs, pair, cond, keys[_NETWORK])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConsistencyTraining:
    """Equation 1 from data alone, for one role, `student`.

    A step takes, per example, the student forward and backward (3) and its target (1).

    The defaults are iCT's. `pairs='ratio'` with first_levels=1 is ECT: the diffusion
    model that the student starts as is made a consistency model little by little.

    Attributes:
      process: of the teacher; networks: 'denoiser'; spec: of the data.
      teacher: where the student starts; None is at random.
      grid: of the levels; None is EDM's, `rho`. Sampling starts at its first one.
      pairs: 'grid', or 'ratio', equation 2 of `levels.py`.
      first_levels, last_levels, growth: N over training, equation 3 there.
      curriculum_steps: K there.
      level_mean, level_std: of equation 1 there, or of log S_t; None, for a grid alone,
        is every level alike.
      huber_scale: h / sqrt(d) of equation 3; 0 is the mean square.
      gap_weight: the weight 1 / (S_t - S_s) instead of 1.
      target_ema: the average in `config.ema` that is f_; '' is the student itself.

    Raises:
      ValueError: `pairs` is another word; a number out of range; stops fall together.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    grid: grids.Grid | None = None
    pairs: str = "grid"
    first_levels: int = 10
    last_levels: int = 1280
    growth: float = 2.0
    curriculum_steps: int = 400_000
    level_mean: float | None = -1.1
    level_std: float = 2.0
    huber_scale: float = 0.00054
    gap_weight: bool = True
    target_ema: str = ""

    samples_from = ("student",)
    roles, phases, phase = base.ROLES, base.phases, base.phase
    predict = predict
    evaluations = {"train": 4.0}

    def __post_init__(self):
        _check(self)
        self._curriculum.check()
        if self.pairs not in ("grid", "ratio"):
            raise ValueError(f"pairs: expected grid or ratio, got {self.pairs!r}.")
        if self.pairs == "ratio" and (self.level_mean is None or self.grid is not None):
            raise ValueError(
                "pairs: 'ratio' draws log S_t from a normal law: it needs level_mean, "
                "and takes no grid."
            )
        if self.pairs == "grid":
            _table(self, self._curriculum.counts)

    @property
    def _curriculum(self) -> levels.Curriculum:
        return levels.Curriculum(
            self.first_levels, self.last_levels, self.growth, self.curriculum_steps
        )

    def check_sampler(self, sampler: Any) -> None:
        """Raises ValueError unless it is for consistency models, from a trained t."""
        base.check_consistency(sampler)
        if self.pairs == "grid":
            first = float(_table(self, self._curriculum.counts).stops[:, 0].max())
            levels.check_start(self, sampler, first)

    def _pairs(self, key: Array, size: int, step: Array) -> tuple[Array, Array]:
        stage, counts = self._curriculum.stage(step), self._curriculum.counts
        if self.pairs == "grid":
            return levels.draw(key, size, _table(self, counts), stage)
        number = jnp.asarray(counts, jnp.float32)[stage]
        schedule = self.process.schedule
        mean, std = self.level_mean, self.level_std
        return levels.draw_ratio(key, size, schedule, number, mean, std)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 and its metrics; 'levels' is N."""
        keys = base.split(inputs.key, 3)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        t, s = self._pairs(keys[_LEVELS], x.shape[0], inputs.step)
        z_t, eps = self.process.corrupt(keys[_NOISE], x, t)
        clean = lift(samplers.is_last(s), x.ndim)
        z_s = jnp.where(clean, x, self.process.mix(x, eps, s))
        pair, key = (z_t, t, z_s, s), keys[_NETWORK]
        loss, metrics = matched(self, params["student"], inputs, pair, cond, key)
        stage = self._curriculum.stage(inputs.step)
        number = jnp.asarray(self._curriculum.counts, jnp.float32)[stage]
        return loss, {**metrics, "levels": (number, jnp.float32(1.0))}
