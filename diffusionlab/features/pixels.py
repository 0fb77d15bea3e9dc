"""The data themselves as features."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.features.base import Network, Room
from diffusionlab.types import DataSpec

_MAX_DIMENSION = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """Every number of an example is a feature: for small images, and vectors.

    Distances of pixels say little about large images.
    """

    outputs = ("features",)

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError where a covariance of the data would be too large."""
        size = 1
        for side in spec.shape:
            size *= side
        if size > _MAX_DIMENSION:
            raise ValueError(
                f"name: the extractor 'pixels' takes at most {_MAX_DIMENSION} numbers "
                f"an example, and the data have {size}; take a feature network."
            )

    def load(self, room: Room) -> Network:
        return Network({}, _flat, lambda x: x, {"network": "pixels"})


def _flat(params, x):
    return {"features": x.reshape(x.shape[0], -1).astype(jnp.float32)}
