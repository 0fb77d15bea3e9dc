"""Multistep consistency models.

Source: Heek, Hoogeboom and Salimans 2024 (arXiv 2403.06807).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base
from diffusionlab.types import (
    Array,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Role,
    Teacher,
    lift,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MultistepConsistency:
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

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = base.check_num_steps

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"student": Role(base.NETWORK, "teacher")}

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {"train": Phase(("student",), self.loss)}

    def phase(self, step: int) -> str:
        return "train"

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        keys = base.split(inputs.key, 4)
        x, cond = inputs.batch["x"].astype(jnp.float32), base.labels(self, inputs.batch)
        size = x.shape[:1]
        fraction = jnp.clip(inputs.step / self.anneal_steps, 0, 1)
        ends = jnp.log(self.first_teacher_steps), jnp.log(self.last_teacher_steps)
        steps = jnp.exp(ends[0] + fraction * (ends[1] - ends[0]))
        n = jnp.maximum(jnp.round(steps / self.num_steps), 1).astype(jnp.int32)
        segment = jax.random.randint(keys[0], size, 0, self.num_steps)
        fine = jax.random.randint(keys[1], size, 1, n + 1)
        b = segment / self.num_steps
        t = b + fine / (n * self.num_steps)
        s = jnp.where(fine == 1, b, t - 1 / (n * self.num_steps))
        z_t, _ = self.process.corrupt(keys[2], x, t)
        taught = base.teach(self, inputs.params["teacher"], z_t, t, cond)
        z_s = base.ddim(self.process, taught.x, z_t, t, s)
        reference = base.apply(self, inputs.params["student"], z_s, s, cond, keys[3]).x
        z_b = jnp.where(
            lift(fine == 1, z_s.ndim),
            z_s,
            base.ddim(self.process, reference, z_s, s, b),
        )
        target = base.inverse_ddim(self.process, z_b, z_t, t, b)
        x_hat = base.apply(self, params["student"], z_t, t, cond, keys[3]).x
        error = base.mean((x_hat - jax.lax.stop_gradient(target)) ** 2)
        loss = jnp.sqrt(error + self.huber_epsilon**2) - self.huber_epsilon
        metrics = {"loss": base.metric(loss), "mse": base.metric(error)}
        return loss.mean(), metrics
