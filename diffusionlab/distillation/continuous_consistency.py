"""Consistency models in continuous time: sCM.

In TrigFlow's variables, with d the standard deviation of the data, S = sigma / alpha,

    tau = arctan(S / d),   x_tau = cos(tau) z_t / alpha = cos(tau) x + sin(tau) d eps
    f = cos(tau) x_tau - sin(tau) d F                                               (1)

so F = (alpha d eps_hat - sigma x_hat / d) / sqrt(alpha² d² + sigma²), of whatever the
process says that its network predicts. Along a path, dx_tau/dtau = d F_true, the F of
the teacher (distillation) or of the x and eps that made z_t (training), and

    g = -cos²(tau) d (F - F_true) - r cos(tau) sin(tau) (x_tau + d dF/dtau)         (2)

is cos(tau) df/dtau at r = 1; r grows from 0 over `warmup_steps`. Made small by

    g / (||g|| + tangent_constant)  or  clip(g, -1, 1)                              (3)

it is what F moves along:

    loss = weight(t) (mean (F - sg F - sg g)² / exp(u(logsnr)) + u(logsnr))         (4)

with t and weight(t) from `times`, and a learned u (the method's exp(u) is exp(-u)
here). The prior weight 1 / (d tan tau) of the method is inside g already: it is what
turns the gradient of f, -sin(tau) d times that of F, into that of (4).

cos(tau) sin(tau) d/dtau is d/dlogS, whose step in t is -2 / logsnr'(t): dF/dtau comes
with its factor out of one Jacobian-vector product of F(z_t, t) along
(dz_t/dt, 1) (-2 / logsnr'), whose tangents stay of the size of the data at both ends.

Source: Lu and Song 2024 (arXiv 2410.11081), section 4 and algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base
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
    Times,
    lift,
)

UNCERTAINTY = "uncertainty"
"""Role and network of u in equation 4."""

_TIMES, _NOISE, _NETWORK = range(3)  # one use of the step's key each


def trig_scales(process: Process, t: Array) -> tuple[Array, Array, Array]:
    """Returns cos(tau), sin(tau) and x_tau / z_t, shaped as t."""
    alpha, sigma = process.schedule.alpha_sigma(t)
    deviation = process.sigma_data
    scale = jnp.sqrt((alpha * deviation) ** 2 + sigma**2)
    return alpha * deviation / scale, sigma / scale, deviation / scale


def trig_network(process: Process, prediction: Prediction, t: Array) -> Array:
    """Returns F of equation 1, `[B, ...]`, of a prediction at t `[B]`."""
    cos, sin, _ = (lift(q, prediction.x.ndim) for q in trig_scales(process, t))
    return cos * prediction.eps - sin * prediction.x / process.sigma_data


def tangent(
    process: Process,
    raw: Array,
    true: Array,
    derivative: Array,
    z_t: Array,
    t: Array,
    warmup: Array,
) -> Array:
    """Returns g of equation 2, `[B, ...]`.

    Args:
      raw, true: F of the student and F_true.
      derivative: cos(tau) sin(tau) dF/dtau.
      z_t, t: where; `[B, ...]` and `[B]`.
      warmup: r in [0, 1].
    """
    cos, sin, scale = (lift(q, z_t.ndim) for q in trig_scales(process, t))
    deviation = process.sigma_data
    return -(cos**2) * deviation * (raw - true) - warmup * (
        cos * sin * scale * z_t + deviation * derivative
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ContinuousConsistency:
    """Equation 4 for the role `student`, and for `uncertainty` in the same phase.

    A step takes, per example, the student forward and backward (3), its Jacobian-vector
    product (1, on top of the same forward pass), and in distillation the teacher (1, or
    2 with guidance).

    Attributes:
      process: of the teacher; spec: of the data.
      networks: 'denoiser', and 'uncertainty' where it is used.
      teacher: whose path it is; in training it is where the student starts, or None.
      times: law of t; the method draws log S ~ N(-1, 1.4²).
      mode: 'distillation' or 'training', sCD and sCT.
      warmup_steps: over which r grows to 1.
      normalize: the first of (3); False is the second, clipping.
      tangent_constant: in (3).
      learned_weighting: train u; False is u = 0 and no role 'uncertainty'.
      guidance_scale: of the teacher; 1 is off.

    Raises:
      ValueError: `mode` is another word; no teacher in distillation, or it cannot be
        guided; guidance in training; a number out of range.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    mode: str = "distillation"
    warmup_steps: int = 10_000
    normalize: bool = True
    tangent_constant: float = 0.1
    learned_weighting: bool = True
    guidance_scale: float = 1.0

    samples_from = ("student",)
    phase = base.phase
    predict = base.predict_student

    def __post_init__(self):
        if self.mode not in ("distillation", "training"):
            raise ValueError(
                f"mode: expected distillation or training, got {self.mode!r}."
            )
        if self.mode == "distillation":
            base.require_teacher(self.teacher)
            base.check_guidance(self)
        elif self.guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} is the teacher's, and the mode "
                "'training' has none; use 1."
            )
        base.check_at_least(self, 0, "warmup_steps", "tangent_constant")

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"student": Role(base.NETWORK, "teacher")}
        if self.learned_weighting:
            roles[UNCERTAINTY] = Role(UNCERTAINTY, ema=())
        return roles

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {"train": Phase(tuple(self.roles), self.loss)}

    @property
    def evaluations(self) -> Mapping[str, float]:
        calls = 1.0 if self.mode == "distillation" else 0.0
        return {"train": 4.0 + calls * base.teacher_evaluations(self)}

    def check_sampler(self, sampler: Any) -> None:
        """Raises ValueError unless it is for consistency models, or of one step."""
        base.check_consistency(sampler)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 4 and its metrics.

        'loss' is (4); 'tangent' is the root mean square of g before (3), which goes to
        zero as the student becomes consistent, and 'tangent_by_logsnr' by noise level.
        """
        keys = base.split(inputs.key, 3)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        t, weight = self.times.sample(keys[_TIMES], x.shape[0], self.process.schedule)
        z_t, eps = self.process.corrupt(keys[_NOISE], x, t)
        path = Prediction(x, eps)
        if self.mode == "distillation":
            path = base.teach(self, inputs.params["teacher"], z_t, t, cond)
        raw, g = self._raw_and_tangent(
            params["student"], path, z_t, t, cond, keys[_NETWORK], inputs.step
        )
        square = base.mean(g**2)
        if self.normalize:
            norm = jnp.sqrt(base.total(g**2))
            g = g / lift(norm + self.tangent_constant, g.ndim)
        else:
            g = jnp.clip(g, -1.0, 1.0)
        error = base.mean((raw - jax.lax.stop_gradient(raw + g)) ** 2)
        loss, metrics = error, {}
        if self.learned_weighting:
            u = self._u(params[UNCERTAINTY], z_t, t)
            loss = error * jnp.exp(-u) + u
            metrics["weighted_error"] = base.metric(weight * error)
        loss = weight * loss
        root = jnp.sqrt(square)
        metrics |= {
            "loss": base.metric(loss),
            "tangent": base.metric(root),
            "tangent_by_logsnr": base.by_logsnr(root, self.process, t),
        }
        return loss.mean(), metrics

    def _raw_and_tangent(
        self,
        params: Params,
        path: Prediction,
        z_t: Array,
        t: Array,
        cond: Cond,
        key: Array,
        step: Array,
    ) -> tuple[Array, Array]:
        """Returns F, through which gradients flow, and g, through which none do."""

        def network(params, z_t, t):
            prediction = base.apply(self, params, z_t, t, cond, key)
            return trig_network(self.process, prediction, t)

        pace = -2.0 / self.process.schedule.derivative(t)
        along = lift(pace, z_t.ndim) * self.process.velocity(path, t)
        still = jax.lax.stop_gradient(params)
        raw, derivative = jax.jvp(
            lambda z_t, t: network(still, z_t, t), (z_t, t), (along, pace)
        )
        warmup = jnp.minimum(step / max(self.warmup_steps, 1), 1.0)
        if not self.warmup_steps:
            warmup = jnp.float32(1.0)
        true = trig_network(self.process, path, t)
        g = tangent(self.process, raw, true, derivative, z_t, t, warmup)
        return network(params, z_t, t), jax.lax.stop_gradient(g)

    def _u(self, params: Params, z_t: Array, t: Array) -> Array:
        cond = {"t": t, "logsnr": self.process.schedule.logsnr(t)}
        return self.networks[UNCERTAINTY].apply(params, z_t, cond, train=True)
