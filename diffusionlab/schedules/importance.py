"""Times drawn where the loss is large, weighted back to uniform t.

For data of variance d² in every direction the smallest possible eps error at logsnr l
is sigmoid(l + 2 log d), that of N(0, d²) data. Times are drawn from

    p(t) = (1 - floor) g(t) / int g + floor,   g = factor(t) sigmoid(l(t) + 2 log d) (1)

and weighted by 1 / p(t) <= 1 / floor. The expected loss is that of uniform t whatever
g is; the closer g is to the loss, the less a batch's loss depends on its times.

p is constant on each of `num_cells` equal cells, and t uniform within its cell: that
the weights undo p holds exactly, not only up to the width of a cell.

Source: Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.3, draw times by running
averages of the loss; here its smallest value, known beforehand, is in their place.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.schedules import times
from diffusionlab.types import Array, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """Equation 1.

    Attributes:
      weighting: factor(t); the block of the objective's weighting.
      data_std: d.
      floor: share of uniform times, in (0, 1].
      num_cells: of the table.
      stratified: spread the times of a batch evenly.

    Raises:
      ValueError: data_std or num_cells is not positive, or floor is outside (0, 1].
    """

    weighting: Any
    data_std: float = 1.0
    floor: float = 0.1
    num_cells: int = 1024
    stratified: bool = True

    def __post_init__(self):
        if self.data_std <= 0:
            raise ValueError(f"data_std: must be positive, got {self.data_std}.")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor: must be in (0, 1], got {self.floor}.")
        if self.num_cells < 1:
            raise ValueError(f"num_cells: must be at least 1, got {self.num_cells}.")

    def density(self, schedule: Schedule) -> np.ndarray:
        """Returns p of equation 1 in each cell, float64 `[num_cells]`, of mean 1."""
        with jax.ensure_compile_time_eval():
            t = (jnp.arange(self.num_cells) + 0.5) / self.num_cells
            error = jax.nn.sigmoid(schedule.logsnr(t) + 2.0 * math.log(self.data_std))
            g = np.float64(self.weighting(schedule, t) * error)
        return (1.0 - self.floor) * g / g.mean() + self.floor

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in [0, 1] and weights `[B]`; both float32."""
        density = self.density(schedule)
        ends = np.cumsum(density) / self.num_cells
        starts = jnp.asarray(np.append(0.0, ends[:-1]), jnp.float32)
        density = jnp.asarray(density, jnp.float32)
        quantile = times.quantiles(key, batch_size, self.stratified)
        cell = jnp.searchsorted(starts, quantile, side="right") - 1
        within = (quantile - starts[cell]) / density[cell]
        t = cell / self.num_cells + jnp.clip(within, 0.0, 1.0 / self.num_cells)
        return jnp.clip(t, 0.0, 1.0), 1.0 / density[cell]
