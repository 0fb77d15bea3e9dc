"""Multistep integration of eps_hat, and what every multistep sampler shares.

With rho = sigma / alpha, lambda = logsnr / 2 = -log rho and h = lambda_s - lambda_t,
the probability-flow ODE has the exact solutions

    z_s = (alpha_s / alpha_t) z_t + alpha_s int eps_hat d rho                       (1)
    z_s = (sigma_s / sigma_t) z_t + alpha_s int_0^1 h e^(-h (1 - u)) x_hat du       (2)

where u is (lambda - lambda_t) / h in (2). A multistep method puts a polynomial through
the predictions f_j made at the nodes u_j, now u_0 = 0 and earlier ones u_j < 0, and
integrates it exactly. In Newton's form, of order p:

    int P d mu = sum_{k < p} f[u_0 .. u_k] int prod_{i < k} (u - u_i) d mu          (3)

so a lower order is the same sum with fewer terms: the first steps, which have too few
predictions behind them, and the last one, which returns x_hat, leave the rest out. The
integrals follow from the moments int u^k d mu:

    polynomials in rho (Adams-Bashforth)   (rho_s - rho_t) / (k + 1)                (4)
    polynomials in log rho, or lambda      (2): w_k(h), (1): (sigma_s / alpha_s) w_k(-h)
        w_k(g) = int_0^1 g e^(-g (1 - u)) u^k du = 1 - (k / g) w_{k-1}(g)           (5)
    polynomials in t (DEIS)                int_0^1 u^k (d rho / du) du, by quadrature

A method of order p whose first step is of order 1 has a global error of h^p plus the
h_1² of that one step: order 2 on equal steps, p where the first steps are shorter.

Source: Zhang and Chen 2022, DEIS (arXiv 2204.13902), section 3 and tAB; Hochbruck and
Ostermann 2010, Exponential integrators, for (5); Adams and Bashforth 1883 for (4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, Predict, Process

_SERIES = 12  # terms of (5) below |g| = 1: the next one is under 1e-9 of the first
_QUADRATURE = 12  # Gauss-Legendre nodes of one step of DEIS


class Memory(NamedTuple):
    """The state of a multistep sampler.

    Attributes:
      z: `[B, ...]` latent.
      x: `[B, ...]` clean data that the last step predicted.
      past: earlier predictions, each `[B, ...]`, the latest first.
      times: of those predictions, scalars.
      count: steps made, int32.
    """

    z: Array
    x: Array
    past: tuple[Array, ...]
    times: tuple[Array, ...]
    count: Array


def remember(z: Array, t: Array, length: int) -> Memory:
    """Returns the state at z_t before any step, with room for `length` predictions."""
    zeros = jnp.zeros_like(z)
    return Memory(z, zeros, (zeros,) * length, (t,) * length, jnp.int32(0))


def after(state: Memory, z: Array, x: Array, prediction: Array, t: Array) -> Memory:
    """Returns the state after a step to z that predicted `prediction` at t."""
    length = len(state.past)
    past = (prediction, *state.past)[:length]
    times = (t, *state.times)[:length]
    return Memory(z, x, past, times, state.count + 1)


def usable(state: Memory, s: Array) -> list[Array]:
    """Returns whether each earlier prediction exists and may be used in a step to s."""
    known = jnp.where(base.is_last(s), 0, state.count)
    return [known > j for j in range(len(state.past))]


def places(state: Memory, coordinate: Callable[[Array], Array]) -> list[Array]:
    """Returns u_1, u_2, ... of (3), given time -> u; -j where nothing was predicted."""
    return [
        jnp.where(state.count > j, coordinate(time), -1.0 - j)
        for j, time in enumerate(state.times)
    ]


def half_logsnr_coordinate(process: Process, t: Array, s: Array):
    """Returns the function tau -> u = (lambda_tau - lambda_t) / h."""
    h = base.half_logsnr_step(process, t, s)
    return lambda time: base.half_logsnr_step(process, t, time) / h


def weights(places: list, moments: list, use: list) -> list[Array]:
    """Returns the weights of f_1 - f_0, f_2 - f_0, ... in (3); f_0 has moments[0].

    Args:
      places: u_1, u_2, ..., different from each other and from u_0 = 0.
      moments: of u^0, u^1, ..., one more than places.
      use: whether the term that ends at u_k counts, for k = 1, 2, ...
    """
    nodes = [0.0, *places]
    found = [0.0] * len(nodes)
    product = [1.0]  # ascending coefficients of prod_{i < k} (u - u_i)
    for k in range(1, len(nodes)):
        raised, lowered = [0.0, *product], [*product, 0.0]
        product = [a - nodes[k - 1] * b for a, b in zip(raised, lowered, strict=True)]
        integral = sum(c * moments[i] for i, c in enumerate(product))
        integral = jnp.where(use[k - 1], integral, 0.0)
        for j in range(k + 1):
            others = [nodes[j] - nodes[i] for i in range(k + 1) if i != j]
            found[j] += integral / math.prod(others)
    return found[1:]


def combine(first: Array, weights: list, now: Array, others: tuple) -> Array:
    """Returns first + sum_j weights_j (f_j - f_0): exact where all f are equal."""
    for weight, other in zip(weights, others, strict=True):
        first = first + weight * (other - now)
    return first


def exponential_moments(g: Array, count: int) -> list[Array]:
    """Returns w_0(g) ... w_{count-1}(g) of (5), g of either sign."""
    small = jnp.abs(g) < 1.0
    inside, outside = jnp.where(small, g, 0.0), jnp.where(small, 1.0, g)
    moments = []
    for k in range(count):
        # Repeated integration by parts; the recursion would cancel for small g.
        series = jnp.ones_like(g)
        for j in reversed(range(k + 2, k + 2 + _SERIES)):
            series = 1.0 - inside / j * series
        moments.append(inside / (k + 1) * series)
    value, large = -jnp.expm1(-outside), []
    for k in range(count):
        value = 1.0 - k / outside * value if k else value
        large.append(value)
    return [jnp.where(small, a, b) for a, b in zip(moments, large, strict=True)]


def _time_moments(process: Process, t: Array, s: Array, count: int) -> list[Array]:
    """Returns int u^k d rho / rho_t for u = (tau - t) / (s - t), by parts."""
    nodes, weight = np.polynomial.legendre.leggauss(_QUADRATURE)
    nodes, weight = 0.5 * (nodes + 1.0), 0.5 * weight
    # rho / rho_t - 1 at the nodes of the quadrature, and at the end of the step.
    inner = t + jnp.asarray(nodes, t.dtype) * (s - t)
    change = jnp.expm1(-base.half_logsnr_step(process, t, inner))
    end = jnp.expm1(-base.half_logsnr_step(process, t, s))
    powers = [jnp.asarray(weight * nodes**k, change.dtype) for k in range(count)]
    return [end] + [end - k * powers[k - 1] @ change for k in range(1, count)]


def _eps_step(process, predict, state, t, s, coordinate, moments) -> Memory:
    """Returns the state after (1), with moments in units of rho_t."""
    prediction = predict(state.z, t)
    # alpha_s rho_t, without the division by a small alpha_t.
    _, sigma_s = process.schedule.alpha_sigma(s)
    scale = sigma_s * jnp.exp(base.half_logsnr_step(process, t, s))
    weight = weights(places(state, coordinate), moments, usable(state, s))
    # Near t = 1 the two terms of (1) are huge and cancel; x_hat and eps_hat do not.
    z = combine(
        process.mix(*prediction, s),
        [scale * w for w in weight],
        prediction.eps,
        state.past,
    )
    return after(state, z, prediction.x, prediction.eps, t)


def _check_order(order: int) -> None:
    if not 1 <= order <= 4:
        raise ValueError(f"order: must be in 1..4, got {order}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamsBashforth:
    """(1) with polynomials in rho, (4): the linear multistep method for eps_hat.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      order: predictions in use, 1 to 4; 1 is DDIM.

    Raises:
      ValueError: num_steps is below 1, or order outside 1..4.
    """

    num_steps: int
    grid: grids.Grid | None = None
    order: int = 4

    times, final = base.times, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        _check_order(self.order)

    def init(self, z: Array, t: Array) -> Memory:
        """Returns the state at z_t `[B, ...]`."""
        return remember(z, t, self.order - 1)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: Memory,
        t: Array,
        s: Array,
        keys: Array,
    ) -> Memory:
        """Returns the state at s, both scalars; `keys` `[B]` is not used."""

        def change(time):  # of rho, in units of rho_t
            return jnp.expm1(-base.half_logsnr_step(process, t, time))

        step = change(s)
        moments = [step / (k + 1) for k in range(self.order)]
        return _eps_step(
            process, predict, state, t, s, lambda time: change(time) / step, moments
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deis:
    """(1) with polynomials in t, or in log rho.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      order: predictions in use, 1 to 4; 1 is DDIM.
      variable: 't', the tAB of the source, or 'log_rho', exact by (5).

    Raises:
      ValueError: num_steps is below 1, order outside 1..4, or variable another word.
    """

    num_steps: int
    grid: grids.Grid | None = None
    order: int = 3
    variable: str = "t"

    times, final = base.times, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        _check_order(self.order)
        if self.variable not in ("t", "log_rho"):
            raise ValueError(
                f"variable: expected 't' or 'log_rho', got {self.variable!r}."
            )

    def init(self, z: Array, t: Array) -> Memory:
        """Returns the state at z_t `[B, ...]`."""
        return remember(z, t, self.order - 1)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: Memory,
        t: Array,
        s: Array,
        keys: Array,
    ) -> Memory:
        """Returns the state at s, both scalars; `keys` `[B]` is not used."""
        if self.variable == "t":
            moments = _time_moments(process, t, s, self.order)
            return _eps_step(
                process,
                predict,
                state,
                t,
                s,
                lambda time: (time - t) / (s - t),
                moments,
            )
        h = base.half_logsnr_step(process, t, s)
        # In units of rho_t, (5) has the factor rho_s / rho_t.
        moments = [jnp.exp(-h) * w for w in exponential_moments(-h, self.order)]
        coordinate = half_logsnr_coordinate(process, t, s)
        return _eps_step(process, predict, state, t, s, coordinate, moments)
