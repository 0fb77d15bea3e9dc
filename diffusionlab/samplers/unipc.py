"""UniPC: a multistep predictor, and a corrector that costs no network evaluation.

With lambda = logsnr / 2, h = lambda_s - lambda_t and u = (lambda - lambda_t) / h,

    z_s = (sigma_s / sigma_t) z_t + alpha_s int_0^1 h e^(-h (1 - u)) x_hat du       (1)

UniP puts a polynomial through the p latest x_hat, the newest at u = 0. UniC then adds
the x_hat evaluated at the predicted z_s, u = 1, which the next step needs anyway, and
takes the step again: one evaluation a step, and one order more. The next step starts
from the corrected z_s with the x_hat of the predicted one.

The integrals of the polynomial are exact (`multistep`, 3 and 5), which is what the
linear system of the source amounts to. It has one equation less where a single
difference is left, UniP-2 and UniC-1, whose weight is B(h) / 2:

    bh1   B = h,   bh2   B = 1 - e^(-h)                                             (2)

Orders are 1, 2, ... in the first steps, as predictions become available.

Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 to 8, data prediction.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from diffusionlab.samplers import base, grids, multistep
from diffusionlab.types import Array, Predict, Process


class State(NamedTuple):
    """The state of UniPC.

    Attributes:
      z: `[B, ...]` latent, predicted and not yet corrected.
      x: `[B, ...]` clean data that the last step predicted.
      start: `[B, ...]` corrected latent from which the last step started.
      past: the latest `order` x_hat, each `[B, ...]`, newest first.
      times: of those predictions, scalars.
      count: steps made, int32.
    """

    z: Array
    x: Array
    start: Array
    past: tuple[Array, ...]
    times: tuple[Array, ...]
    count: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC:
    """UniPC-p; the result is the x_hat of the last step.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      order: p, predictions in use, 1 to 3.
      variant: 'bh1' or 'bh2', the B of (2).

    Raises:
      ValueError: num_steps is below 1, order outside 1..3, or variant another word.
    """

    num_steps: int
    grid: grids.Grid | None = None
    order: int = 3
    variant: str = "bh2"

    times, final = base.times, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        if not 1 <= self.order <= 3:
            raise ValueError(f"order: must be in 1..3, got {self.order}.")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant: expected 'bh1' or 'bh2', got {self.variant!r}.")

    def init(self, z: Array, t: Array) -> State:
        """Returns the state at z_t `[B, ...]`."""
        zeros = jnp.zeros_like(z)
        past, times = (zeros,) * self.order, (t,) * self.order
        return State(z, zeros, z, past, times, jnp.int32(0))

    def step(
        self,
        process: Process,
        predict: Predict,
        state: State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> State:
        """Returns the state at s, both scalars; `keys` `[B]` is not used."""
        x = predict(state.z, t).x
        start = self._corrected(process, state, x, t)
        z = self._predicted(process, state, start, x, t, s)
        past = (x, *state.past)[: self.order]
        times = (t, *state.times)[: self.order]
        return State(z, x, start, past, times, state.count + 1)

    def _corrected(self, process, state: State, x: Array, t: Array) -> Array:
        """Returns z_t by UniC, from where the last step started; z before any step."""
        known = state.count > 0
        # Before any step there is no way back; another time keeps the numbers finite.
        elsewhere = jnp.where(t > 0.5, t - 0.25, t + 0.25)
        origin = jnp.where(known, state.times[0], elsewhere)
        h = base.half_logsnr_step(process, origin, t)
        older = [
            jnp.where(
                state.count > j, base.half_logsnr_step(process, origin, time) / h, -j
            )
            for j, time in enumerate(state.times[1:], start=1)
        ]
        use = [known, *(state.count > j for j in range(1, self.order))]
        alone = ~use[1] if self.order > 1 else True
        moments = self._moments(h, self.order + 1, alone)
        weights = multistep.weights([1.0, *older], moments, use)
        z = _advance(
            process,
            state.start,
            state.past[0],
            origin,
            t,
            weights,
            (x, *state.past[1:]),
        )
        return jnp.where(known, z, state.z)

    def _predicted(
        self, process, state: State, start: Array, x: Array, t: Array, s: Array
    ) -> Array:
        """Returns z_s by UniP from the corrected z_t."""
        h = base.half_logsnr_step(process, t, s)
        coordinate = multistep.half_logsnr_coordinate(process, t, s)
        older = multistep.places(state, coordinate)[: self.order - 1]
        use = multistep.usable(state, s)[: self.order - 1]
        alone = ~use[1] if self.order > 2 else True
        moments = self._moments(h, self.order, alone)
        weights = multistep.weights(older, moments, use)
        return _advance(process, start, x, t, s, weights, state.past[: self.order - 1])

    def _moments(self, h: Array, count: int, alone: Array | bool) -> list[Array]:
        """Returns the moments of (1); `alone`: a single difference is in use."""
        moments = multistep.exponential_moments(h, count)
        scale = h if self.variant == "bh1" else -jnp.expm1(-h)
        if count > 1:
            moments[1] = jnp.where(alone, 0.5 * scale, moments[1])
        return moments


def _advance(
    process: Process,
    z_t: Array,
    x: Array,
    t: Array,
    s: Array,
    weights: list[Array],
    others: tuple[Array, ...],
) -> Array:
    """Returns z_s of (1): x at u = 0, and the weights of other predictions."""
    alpha_s, sigma_s = process.schedule.alpha_sigma(s)
    _, sigma_t = process.schedule.alpha_sigma(t)
    first = sigma_s / sigma_t * z_t + base.ddim_weight(process, t, s) * x
    return multistep.combine(first, [alpha_s * w for w in weights], x, others)
