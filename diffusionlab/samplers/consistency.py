"""Consistency sampling: predict the clean data, add fresh noise, predict again.

    z_s = alpha_s x_hat(z_t, t) + sigma_s noise                                     (1)

It samples networks whose every x_hat is a sample: consistency models, and generators of
a few steps.

Source: Song, Dhariwal, Chen and Sutskever 2023 (arXiv 2303.01469), algorithm 1.
"""

from __future__ import annotations

import dataclasses

from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, Predict, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency:
    """Equation 1; the result is the x_hat of the last step.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.

    Raises:
      ValueError: num_steps is below 1.
    """

    num_steps: int
    grid: grids.Grid | None = None

    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s < t, both scalars; `keys` is `[B]`."""
        x = predict(state.z, t).x
        noise = base.normal(keys, state.z.shape[1:])
        return base.State(process.mix(x, noise, s), x)
