"""DPM-Solver++: exponential integration of x_hat, for the ODE and for SDEs.

With lambda = logsnr / 2, h = lambda_s - lambda_t and eta >= 0, all of these processes
have the marginals of the diffusion; eta = 0 is the probability-flow ODE, eta = 1 the
reverse-time SDE:

    z_s = (sigma_s / sigma_t) e^(-eta h) z_t
          + alpha_s int_0^1 g e^(-g (1 - u)) x_hat(lambda_t + u h) du
          + sigma_s sqrt(1 - e^(-2 eta h)) noise,   g = (1 + eta) h                 (1)

The solvers differ in what stands for x_hat. With D_1 = (f_0 - f_1) / r_1 the slope in u
from the previous step, r_1 its length over h, and w_k(g) the moments of `multistep`:

    1S   w_0 f_0                                                                    (2)
    2M   w_0 (f_0 + D_1 / 2)                                                        (3)
    3M   w_0 f_0 + w_1 D_1 + (w_2 + r_1 w_1) f[u_0, u_1, u_2]                       (4)
    2S   w_0 f(middle), the middle of lambda reached by (2)                         (5)

(3) takes w_1 = w_0 / 2, right to its order. The second step of (4) stops after D_1.

The eta of DDIM counts otherwise: 1 - eta² c = e^(-2 eta h) with c = 1 - e^(-2 h). The
two agree at 0 and at 1, where (2) is ancestral sampling with noise exponent 0.

Source: Lu et al. 2022 (arXiv 2211.01095), algorithms 1 and 2 for eta = 0, the section
on SDE solvers for eta = 1. (4) integrates the parabola exactly; see Dpm3M.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.samplers import base, grids, multistep
from diffusionlab.types import Array, Predict, Process


def _check(sampler) -> None:
    base.check_num_steps(sampler.num_steps)
    if sampler.eta < 0:
        raise ValueError(f"eta: must be at least 0, got {sampler.eta}.")


def _keep(sampler, process: Process, z_t: Array, t: Array, s: Array) -> Array:
    """Returns the first term of (1)."""
    _, sigma_t = process.schedule.alpha_sigma(t)
    _, sigma_s = process.schedule.alpha_sigma(s)
    decay = jnp.exp(-sampler.eta * base.half_logsnr_step(process, t, s))
    return sigma_s / sigma_t * decay * z_t


def _noise(sampler, process: Process, t: Array, s: Array) -> Array:
    """Returns the factor of the noise in (1)."""
    _, sigma_s = process.schedule.alpha_sigma(s)
    h = base.half_logsnr_step(process, t, s)
    return sigma_s * jnp.sqrt(-jnp.expm1(-2.0 * sampler.eta * h))


def _first_order(sampler, process, x: Array, z_t: Array, t: Array, s: Array) -> Array:
    """Returns z_s of (1) and (2) without its noise."""
    alpha_s, _ = process.schedule.alpha_sigma(s)
    g = (1.0 + sampler.eta) * base.half_logsnr_step(process, t, s)
    kept = _keep(sampler, process, z_t, t, s)
    return kept - alpha_s * jnp.expm1(-g) * x


def _multistep(
    self,
    process: Process,
    predict: Predict,
    state: multistep.Memory,
    t: Array,
    s: Array,
    keys: Array,
) -> multistep.Memory:
    """Returns the state at s, both scalars; `keys` `[B]` is used for eta > 0."""
    x = predict(state.z, t).x
    alpha_s, _ = process.schedule.alpha_sigma(s)
    h = base.half_logsnr_step(process, t, s)
    places = multistep.places(state, multistep.half_logsnr_coordinate(process, t, s))
    moments = self.moments((1.0 + self.eta) * h)
    weight = multistep.weights(places, moments, multistep.usable(state, s))
    first = _first_order(self, process, x, state.z, t, s)
    z = multistep.combine(first, [alpha_s * w for w in weight], x, state.past)
    if self.eta:
        noise = base.normal(keys, z.shape[1:])
        z = z + _noise(self, process, t, s) * noise
    return multistep.after(state, z, x, x, t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpm1S:
    """(1) and (2): DDIM for eta = 0, ancestral sampling for eta = 1.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      eta: 0 is the ODE, 1 the SDE.

    Raises:
      ValueError: num_steps is below 1, or eta negative.
    """

    num_steps: int
    grid: grids.Grid | None = None
    eta: float = 0.0

    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        _check(self)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s, both scalars; `keys` `[B]` is used for eta > 0."""
        x = predict(state.z, t).x
        z = _first_order(self, process, x, state.z, t, s)
        if self.eta:
            noise = base.normal(keys, z.shape[1:])
            z = z + _noise(self, process, t, s) * noise
        return base.State(z, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpm2M:
    """(1) and (3), the multistep solver of order 2.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      eta: 0 is the ODE, 1 the SDE.

    Raises:
      ValueError: num_steps is below 1, or eta negative.
    """

    num_steps: int
    grid: grids.Grid | None = None
    eta: float = 0.0

    times, step, final = base.times, _multistep, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        _check(self)

    def init(self, z: Array, t: Array) -> multistep.Memory:
        """Returns the state at z_t `[B, ...]`."""
        return multistep.remember(z, t, 1)

    def moments(self, g: Array) -> list[Array]:
        """Returns the moments of u^0 and u^1 in (3)."""
        whole = -jnp.expm1(-g)
        return [whole, 0.5 * whole]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpm3M:
    """(1) and (4), the multistep solver of order 3.

    The published code, and its descendants, weigh the second difference by half of what
    the parabola asks for, w_2 / 2 instead of w_2, and are of order 2.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      eta: 0 is the ODE, 1 the SDE.
      published: the weight of the published code.

    Raises:
      ValueError: num_steps is below 1, or eta negative.
    """

    num_steps: int
    grid: grids.Grid | None = None
    eta: float = 0.0
    published: bool = False

    times, step, final = base.times, _multistep, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        _check(self)

    def init(self, z: Array, t: Array) -> multistep.Memory:
        """Returns the state at z_t `[B, ...]`."""
        return multistep.remember(z, t, 2)

    def moments(self, g: Array) -> list[Array]:
        """Returns the moments of u^0, u^1 and u^2 in (4)."""
        whole, slope, square = multistep.exponential_moments(g, 3)
        return [whole, slope, 0.5 * square if self.published else square]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpm2S:
    """(1) and (5), the single-step solver of order 2.

    The noise of a step continues that of its first half, as one path of the SDE does.

    Attributes:
      num_steps: steps; two network evaluations each, the last one has one.
      grid: the times; None is uniform.
      eta: 0 is the ODE, 1 the SDE.

    Raises:
      ValueError: num_steps is below 1, or eta negative.
    """

    num_steps: int
    grid: grids.Grid | None = None
    eta: float = 0.0

    times, init, final = base.times, base.init, base.final

    def __post_init__(self):
        _check(self)

    @property
    def num_evaluations(self) -> int:
        """Network evaluations of one sample."""
        return 2 * self.num_steps - 1

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s, both scalars; `keys` `[B]` is used for eta > 0."""
        x = predict(state.z, t).x
        logsnr = process.schedule.logsnr
        middle = process.schedule.inverse(0.5 * (logsnr(t) + logsnr(s)))
        at_middle = at_end = 0.0
        if self.eta:
            shape = state.z.shape[1:]
            first, second = (base.normal(base.fold(keys, i), shape) for i in range(2))
            at_middle = _noise(self, process, t, middle) * first
            at_end = _keep(self, process, at_middle, middle, s)
            at_end = at_end + _noise(self, process, middle, s) * second

        def halfway(x: Array) -> Array:
            z = _first_order(self, process, x, state.z, t, middle) + at_middle
            # The inverse of the schedule is rounded: share is 1 up to that.
            share = 0.5 * base.half_logsnr_step(process, t, s)
            share = share / base.half_logsnr_step(process, t, middle)
            return x + share * (predict(z, middle).x - x)

        used = jax.lax.cond(base.is_last(s), lambda x: x, halfway, x)
        z = _first_order(self, process, used, state.z, t, s) + at_end
        return base.State(z, x)
