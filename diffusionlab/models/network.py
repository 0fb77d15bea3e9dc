"""A flax module as a `Network`: two pure functions, float32 at the boundary."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusionlab.types import DataSpec, Network

FEATURES = "intermediates"
"""The collection in which a module names them."""


def as_network(module: nn.Module, spec: DataSpec) -> Network:
    """Returns the pure functions of a module `(z, cond, *, train) -> raw output`.

    This is the one place where precision changes: the noisy data enter in the module's
    compute dtype, the raw output leaves in float32.

    Args:
      module: has the fields `spec` and `dtype`, and the rules `PARAM_AXES`; one that
        does not see data has an `input_shape`, one that sees tokens `sees_tokens`,
        and `scores_targets`, `is_causal` and `noise_input` where it is what `Network`
        says of them.
      spec: the data it sees, for the shapes at initialisation.
    """
    dtype = jnp.dtype(module.dtype)
    shape = getattr(module, "input_shape", spec.shape)
    seen = jnp.int32 if getattr(module, "sees_tokens", False) else dtype

    def init(key):
        z = jnp.zeros((1, *shape), seen)
        cond = {"t": jnp.zeros(1), "logsnr": jnp.zeros(1)}
        if spec.num_classes:
            cond["label"] = jnp.zeros(1, jnp.int32)
        cond |= {name: jnp.zeros(1) for name in getattr(module, "conditions", ())}
        return module.init({"params": key}, z, cond, train=False)["params"]

    def apply(params, z, cond, *, train=False, key=None):
        rngs = None if key is None else {"dropout": key}
        train = train and key is not None
        variables = {"params": params}
        raw = module.apply(variables, z.astype(seen), cond, train=train, rngs=rngs)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), raw)

    def features(params, z, cond):
        raw, state = module.apply(
            {"params": params},
            z.astype(seen),
            cond,
            train=False,
            mutable=[FEATURES],
        )
        if "features" not in state.get(FEATURES, {}):
            raise ValueError(
                f"name: the network {type(module).__name__} names no features; one "
                "that does calls `self.sow('intermediates', 'features', h)` before "
                "its last layer, as 'classifier' does."
            )
        (found,) = state[FEATURES]["features"]
        return raw.astype(jnp.float32), found.astype(jnp.float32)

    return Network(
        init,
        apply,
        module.PARAM_AXES,
        features,
        scores_targets=getattr(module, "scores_targets", False),
        is_causal=getattr(module, "is_causal", False),
        noise_input=getattr(module, "noise_input", 0),
    )
