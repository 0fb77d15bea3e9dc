"""The probability-flow ODE in time, solved to a tolerance.

    dz / dt = alpha'_t x_hat(z, t) + sigma'_t eps_hat(z, t)                         (1)

An embedded Runge-Kutta pair of order 5 chooses the steps of every example by itself,
so a sample does not depend on its batch; the batch is as slow as its slowest example.
The steps end at t = 0, and one more evaluation there returns x_hat.

Source: Song et al. 2021 (arXiv 2011.13456), section 4.3 and appendix D.4, for the ODE
and the last denoising step; Tsitouras 2011 and Dormand and Prince 1980 for the pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, Predict, Process

SOLVERS = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5}

# Both pairs have seven stages, of which the first is the last of the step before.
_PER_STEP, _TO_START = 6, 1

# The first step as a share of its sub-interval; a guess from slopes costs evaluations.
_FIRST = 0.01


class State(NamedTuple):
    """The latent, the clean data of the last step, and how often each was evaluated.

    Attributes:
      z, x: `[B, ...]`.
      evaluations: int32 `[B]`, of each example by itself.
    """

    z: Array
    x: Array
    evaluations: Array


def _one_by_one(function: Callable[[Array, Array], Array], z: Array, times: Array):
    """Returns (single, arrays): `single(arrays, time, z)` for an example under vmap.

    `function` takes a batch and a time for each example, and knows things about every
    one of them, such as its label. A plain vmap over batches of one would lose these;
    here the vmapped call is the call of the whole batch.

    Args:
      function: (z `[B, ...]`, times `[B]`) -> `[B, ...]`.
      z, times: examples of its arguments, for their shapes.
    """
    # What `function` closes over has to come in as an argument.
    closed = eqx.filter_closure_convert(function, z, times)
    arrays, rest = eqx.partition(closed, eqx.is_array)

    @custom_vmap
    def single(arrays, time, z):
        return jnp.full_like(z, jnp.nan)  # never seen: there is no single example

    @single.def_vmap
    def together(size, batched, arrays, time, z):
        time, z = (
            q if is_batched else jnp.broadcast_to(q, (size, *jnp.shape(q)))
            for q, is_batched in zip((time, z), batched[1:], strict=True)
        )
        return eqx.combine(arrays, rest)(z, time), True

    return single, arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbabilityFlow:
    """Equation 1 to a tolerance; an example that needs more than max_steps is NaN.

    Attributes:
      num_steps: sub-intervals, each of which starts with a small step anew.
      grid: where the sub-intervals end; None is uniform.
      solver: 'tsit5' or 'dopri5'.
      rtol, atol: accepted error of a step, relative and absolute, as the root mean
        square over one example.
      max_steps: accepted and rejected steps of a sub-interval.
      num_evaluations: None, as it is not known beforehand; the last state has the
        number of each example.

    Raises:
      ValueError: a count is below 1, a tolerance is not positive, or solver is another
        word.
    """

    num_steps: int = 1
    grid: grids.Grid | None = None
    solver: str = "tsit5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096

    times, final = base.times, base.final
    num_evaluations = None

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        if self.solver not in SOLVERS:
            raise ValueError(
                f"solver: unknown '{self.solver}'; known: {', '.join(sorted(SOLVERS))}."
            )
        for name in ("rtol", "atol"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name}: must be positive, got {getattr(self, name)}."
                )
        if self.max_steps < 1:
            raise ValueError(f"max_steps: must be at least 1, got {self.max_steps}.")

    def init(self, z: Array, t: Array) -> State:
        """Returns the state at z_t `[B, ...]`."""
        return State(z, jnp.zeros_like(z), jnp.zeros(z.shape[:1], jnp.int32))

    def step(
        self,
        process: Process,
        predict: Predict,
        state: State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> State:
        """Returns the state at s, both scalars; deterministic: `keys` is not used.

        `predict` is called with a time for each example, `[B]`, but for the last time.
        """
        times = jnp.broadcast_to(t, state.z.shape[:1])
        velocity, arrays = _one_by_one(
            lambda z, time: process.velocity(predict(z, time), time), state.z, times
        )

        def solve(z):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda time, z, arrays: velocity(arrays, time, z)),
                SOLVERS[self.solver](),
                t0=t,
                t1=s,
                dt0=_FIRST * (s - t),
                y0=z,
                args=arrays,
                stepsize_controller=diffrax.PIDController(
                    rtol=self.rtol, atol=self.atol
                ),
                max_steps=self.max_steps,
                throw=False,
            )
            solved = solution.result == diffrax.RESULTS.successful
            z_s = jnp.where(solved, solution.ys[0], jnp.nan)
            return z_s, _TO_START + _PER_STEP * solution.stats["num_steps"]

        z_s, evaluations = jax.vmap(solve)(state.z)
        last = base.is_last(s)
        x = jax.lax.cond(last, lambda: predict(z_s, s).x, lambda: state.x)
        total = state.evaluations + evaluations + last.astype(jnp.int32)
        return State(z_s, x, total.astype(jnp.int32))
