"""Students that are told one more number than their teacher."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base


def check(objective: Any, name: str) -> None:
    """Raises ValueError unless the student's network makes use of cond[name].

    Args:
      objective: has `networks`, `process`, `spec` and `teacher`.
      name: of the number, `[B]`.
    """
    network, spec = objective.networks[base.NETWORK], objective.spec
    number = jax.ShapeDtypeStruct((1,), jnp.float32)
    label = base.labels(objective, {"label": jnp.zeros(1, jnp.int32)})
    cond = jax.eval_shape(lambda t: base.conditions(objective, t, label), number)
    z_t = jax.ShapeDtypeStruct((1, *spec.shape), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0))

    def apply(told, params, z_t, cond):
        return network.apply(params, z_t, {**cond, name: told})

    traced = jax.make_jaxpr(apply)(number, params, z_t, cond).jaxpr
    told = traced.invars[0]
    if not any(told is used for step in traced.eqns for used in step.invars):
        raise ValueError(
            f"config.networks.{base.NETWORK}.conditions: this student is told "
            f"'{name}', and its network does not look at it; use ('{name}',)."
        )
