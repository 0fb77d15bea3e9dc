"""Moment matching: E[x | z_s] of the student's samples becomes the teacher's.

From noised data z_t the student predicts x~ = x_student(z_t, t), and a step of the
sampler goes to an earlier s,

    z_s = alpha_s x~ + sigma_s (sqrt(1 - rho² c) eps~ + rho sqrt(c) n)              (1)

with c = 1 - exp(logsnr_t - logsnr_s), eps~ = (z_t - alpha_t x~) / sigma_t and fresh
noise n; rho = 1 is the posterior q(z_s | z_t, x~). Were x~ a draw from q(x | z_t),
then z_s would have the marginal q(z_s), and x~ given z_s the mean E[x | z_s] that the
teacher knows. An auxiliary denoiser learns this mean for the student's samples, in
turns with the student, w being a function of s:

    L_aux = w (mean_pixels (x~ - x_aux(z_s))² + mean_pixels (x_teacher - x_aux)²)   (2)
    L_student = w mean_pixels x~ sg[x_aux(z_s, s) - x_teacher(z_s, s)]              (3)

In (2) only the auxiliary network has a gradient, in (3) only x~: none flows through
z_s. The second term of (2) keeps the auxiliary network near the teacher: its optimum is
the mean of both targets, and x_aux - x_teacher half of the gap between the moments. The
value of (3) is not bounded below. What is returned has x~ - x_teacher in place of x~,
which changes no gradient; at the optimum of (2) its mean is twice that of
w mean_pixels (x_aux - x_teacher)², and falls to 0 with it.

A student without noise of its own can be exact only at t = 1. Elsewhere it is a
compromise over s: on gaussian data, with t at the k stops of the sampler and
w = SNR + 1, the variance of its samples is within a few percent of the data's; with
w = 1 it is far below. With 'continuous' t the auxiliary network averages over all t
that lead to s, the equations have no unique solution, and the variance came out at half
of the data's on a mixture.

Source: Salimans, Mensink, Heek and Hoogeboom 2024 (arXiv 2406.04103), algorithm 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.distillation import base
from diffusionlab.objectives.weightings import Weighting
from diffusionlab.samplers import grids
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules import times as laws
from diffusionlab.types import (
    Array,
    Batch,
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
    lift,
)

_NEAR_ZERO = 1e-6  # the SNR of s = 0 may be infinite


class Draw(NamedTuple):
    """Samples of the student, and where they lead.

    Attributes:
      x: `[B, ...]`, x~; gradients flow into the student.
      z_s: `[B, ...]`, equation 1, without a gradient.
      s: `[B]`.
      weight: `[B]`, w(s).
      cond: of these examples.
    """

    x: Array
    z_s: Array
    s: Array
    weight: Array
    cond: Cond


def check(objective: Any) -> None:
    """Raises ValueError where the fields that both variants have are wrong."""
    base.require_teacher(objective.teacher)
    base.check_guidance(objective)
    base.check_at_least(objective, 1, "num_steps")
    base.check_word(objective, "times_option", ("continuous", "grid"))
    base.check_word(objective, "renoising", ("posterior", "independent"))
    if not 0 < objective.posterior_noise <= 1:
        raise ValueError(
            "posterior_noise: must be above 0 and at most 1, as nothing is learned "
            f"from a step without noise; got {objective.posterior_noise}."
        )
    known = getattr(objective.process, "sigma_data", None)
    told = getattr(objective.weighting, "sigma_data", known)
    if told != known:
        raise ValueError(
            f"weighting.sigma_data: is {told}, but the process has {known}; give both "
            "the same number."
        )


def check_sampler(objective: Any, sampler: Any) -> None:
    """Raises ValueError for a sampler that makes other steps than those trained."""
    check_stops(objective, sampler)
    if objective.num_steps > 1 and not _makes_equation_1(objective, sampler):
        raise ValueError(
            "name: a student of moment matching is sampled by 'ancestral' with "
            "noise_exponent 0, or by 'ddim' with eta = config.objective.posterior_noise"
            f" = {objective.posterior_noise} if that is not 1, or by 'consistency' "
            "with config.objective.renoising 'independent'."
        )


def check_stops(objective: Any, sampler: Any) -> None:
    """Raises ValueError unless the sampler's times are the grid that is trained."""
    base.check_num_steps(objective, sampler)
    found = np.asarray(sampler.times(objective.process.schedule))
    trained = stops(objective)
    if not np.allclose(found, trained, atol=1e-6):
        raise ValueError(
            f"grid: config.objective.grid trains the times {trained.round(4).tolist()},"
            f" and the sampler makes {found.round(4).tolist()}; give both one grid."
        )


def _makes_equation_1(objective: Any, sampler: Any) -> bool:
    if objective.renoising == "independent":
        return isinstance(sampler, Consistency)
    if isinstance(sampler, Ancestral):
        return objective.posterior_noise == 1 and sampler.noise_exponent == 0
    return isinstance(sampler, Ddim) and sampler.eta == objective.posterior_noise


def stops(objective: Any) -> np.ndarray:
    """Returns the times of the sampler, float32 `[num_steps + 1]`, falling to 0."""
    grid = objective.grid or grids.Uniform()
    with jax.ensure_compile_time_eval():
        found = grid(objective.process.schedule, objective.num_steps)
        return np.asarray(found, np.float32)


def times(objective: Any, key: Array, size: int) -> tuple[Array, Array]:
    """Returns t and s <= t, `[B]` each.

    Both are drawn on the scale of u in [0, 1] on which the k steps of the sampler are
    equal: s is uniform, spread evenly over the batch; t is less than 1 / k later and at
    most 1 ('continuous'), or the next stop of the sampler ('grid').

    Source: arXiv 2406.04103, algorithm 2, for 'continuous'.
    """
    s_key, t_key = jax.random.split(key)
    number = objective.num_steps
    s = jnp.maximum(laws.quantiles(s_key, size, stratified=True), _NEAR_ZERO)
    if objective.times_option == "grid":
        t = (jnp.floor(s * number) + 1) / number
    else:
        t = s + jax.random.uniform(t_key, (size,)) / number
    t = jnp.minimum(t, 1.0)
    if objective.grid is None:
        return t, s
    rising, places = stops(objective)[::-1], np.linspace(0, 1, number + 1)
    return jnp.interp(t, places, rising), jnp.interp(s, places, rising)


def step(
    process: Process,
    prediction: Prediction,
    noise: Array,
    t: Array,
    s: Array,
    posterior_noise: float = 1.0,
) -> Array:
    """Returns z_s of equation 1, `[B, ...]`.

    Nothing is divided by alpha_t, which may be 0 at t = 1; at s = 0 it is x~.

    Args:
      prediction: x~ and eps~ at z_t.
      noise: `[B, ...]`, n.
      t, s: `[B]`, s <= t.
      posterior_noise: rho.
    """
    change = process.schedule.logsnr(t) - process.schedule.logsnr(s)
    # 1 - rho² c, where c rounds to 1 on a long step.
    square = posterior_noise**2
    keep = jnp.sqrt((1 - square) + square * jnp.exp(change))
    fresh = posterior_noise * jnp.sqrt(-jnp.expm1(change))
    keep, fresh = (lift(q, noise.ndim) for q in (keep, fresh))
    return process.mix(prediction.x, keep * prediction.eps + fresh * noise, s)


def draw(objective: Any, params: Params, batch: Batch, key: Array) -> Draw:
    """Returns samples of the student with the parameters `params`, and z_s.

    Args:
      objective: has the fields that both variants share.
      batch: 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
      key: of this use.
    """
    keys = base.split(key, 4)
    x, cond = batch["x"].astype(jnp.float32), base.labels(objective, batch)
    process = objective.process
    t, s = times(objective, keys[0], x.shape[0])
    z_t, _ = process.corrupt(keys[1], x, t)
    found = base.apply(objective, params, z_t, t, cond, keys[2])
    noise = jax.random.normal(keys[3], x.shape)
    if objective.renoising == "independent":
        z_s = process.mix(found.x, noise, s)
    else:
        z_s = step(process, found, noise, t, s, objective.posterior_noise)
    # Weightings are stated for the error of eps, which is SNR times that of x.
    snr = jnp.exp(process.schedule.logsnr(s))
    weight = snr * objective.weighting(process.schedule, s)
    return Draw(found.x, jax.lax.stop_gradient(z_s), s, weight, cond)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MomentMatching:
    """Equations 2 and 3 in turns, for the roles `aux` and `student`.

    A step of phase 'aux' is 5 network evaluations per example, 4 without
    `average_targets`; one of phase 'student' is 5. A guided teacher is one more in
    each. The networks `student` and `aux` start as the teacher, whose aux is therefore
    right where the student is: its first gradient is exactly 0.

    The teacher answers without dropout. So does the auxiliary network, or dropout would
    be a part of their difference; the student trains with it.

    Attributes:
      process: how data become noise and what networks predict.
      networks: has the entry 'denoiser', of both roles.
      spec: shape and classes of the data.
      teacher: that is matched.
      weighting: w / SNR, a factor on the squared eps error: 'v' is w = SNR + 1, 'edm'
        SNR + 1 / sigma_data², 'x' is w = 1, 'min_snr' bounds w.
      num_steps: k, of the sampler.
      grid: of the sampler; None is uniform.
      times_option: 'continuous', the published one, where t - s < 1 / k; or 'grid', t
        being one of the sampler's stops and s any time between it and the next.
      posterior_noise: rho of equation 1, in (0, 1].
      renoising: 'posterior' is equation 1; 'independent' is z_s = alpha_s x~ + sigma_s
        n, for comparison: it is the same only where t = 1.
      guidance_scale: of the teacher; the student has the guidance inside.
      average_targets: the second term of equation 2.
      aux_steps: steps of phase 'aux' before each one of phase 'student'.

    Raises:
      ValueError: there is no teacher, or none that can be guided; a number or a word
        is not one of these; weighting and process have another sigma_data.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    weighting: Weighting
    num_steps: int = 8
    grid: grids.Grid | None = None
    times_option: str = "continuous"
    posterior_noise: float = 1.0
    renoising: str = "posterior"
    guidance_scale: float = 1.0
    average_targets: bool = True
    aux_steps: int = 1

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = check_sampler

    def __post_init__(self):
        check(self)
        base.check_at_least(self, 1, "aux_steps")

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "student": Role(base.NETWORK, "teacher"),
            "aux": Role(base.NETWORK, "teacher", ema=()),
        }

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {
            "aux": Phase(("aux",), self.aux_loss),
            "student": Phase(("student",), self.student_loss),
        }

    @property
    def evaluations(self) -> Mapping[str, float]:
        teacher = base.teacher_evaluations(self)
        return {
            "aux": 1.0 + 3.0 + teacher * self.average_targets,
            "student": 3.0 + 1.0 + teacher,
        }

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then 'student' for one."""
        return base.turns(step, self.aux_steps)

    def aux_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 and its metrics; only `params["aux"]` has a gradient."""
        found = draw(self, inputs.params["student"], inputs.batch, inputs.key)
        guess = base.apply(self, params["aux"], found.z_s, found.s, found.cond).x
        error = base.mean((jax.lax.stop_gradient(found.x) - guess) ** 2)
        if self.average_targets:
            error += base.mean((self._taught(found, inputs) - guess) ** 2)
        loss = found.weight * error
        return loss.mean(), {
            "aux_loss": base.metric(loss),
            "aux_loss_by_logsnr": base.by_logsnr(loss, self.process, found.s),
        }

    def student_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 and its metrics; only `params["student"]` has a gradient.

        The metric 'loss' is w mean_pixels (x_aux - x_teacher)², which goes to 0. The
        value returned is 'surrogate'; far below twice the loss it says that the
        auxiliary network does not keep up with the student.
        """
        found = draw(self, params["student"], inputs.batch, inputs.key)
        aux = inputs.params["aux"]
        guess = base.apply(self, aux, found.z_s, found.s, found.cond).x
        taught = self._taught(found, inputs)
        gap = jax.lax.stop_gradient(guess) - taught
        surrogate = found.weight * base.mean((found.x - taught) * gap)
        loss = found.weight * base.mean(gap**2)
        return surrogate.mean(), {
            "loss": base.metric(loss),
            "surrogate": base.metric(surrogate),
            "loss_by_logsnr": base.by_logsnr(loss, self.process, found.s),
        }

    def _taught(self, found: Draw, inputs: Inputs) -> Array:
        teacher = inputs.params["teacher"]
        taught = base.teach(self, teacher, found.z_s, found.s, found.cond).x
        return jax.lax.stop_gradient(taught)
