"""The gaussian process, and the spaces in which a network may predict.

    z_t = alpha x + sigma eps,   eps ~ N(0, I)                                      (1)
    v = alpha eps - sigma x,   velocity = dz_t/dt = alpha' x + sigma' eps           (2)

For s < t and c = 1 - exp(logsnr_t - logsnr_s), q(z_s | z_t, x) is normal with

    mean = alpha_s (z_t (1 - c) / alpha_t + c x),   var = sigma_s² c                (3)

Let q = alpha² d² + sigma², the variance of z_t for data of variance d². For N(0, d² I)
data the variance of q(z_s | z_t) is (q_s / q_t) sigma_t² c. Sampling may use any
variance in between:

    log var = log c + (1 - gamma) log sigma_s² + gamma log(sigma_t² q_s / q_t)      (4)

For d = 1 and alpha² + sigma² = 1 its end gamma = 1 is that of q(z_t | z_s), sigma_t² c.
Both ends are those of z / alpha at any other scale: only logsnr and d matter.

EDM's network F answers in a space of unit variance, for data of variance d²:

    x = (alpha d² / q) z_t + (sigma d / sqrt q) F                                   (5)

which is F = -v for d = 1 and alpha² + sigma² = 1. Its input is z_t / sqrt q.

None of this needs alpha² + sigma² = 1. Everything here is float32, whatever comes in.

Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239); Salimans and Ho 2022
(arXiv 2202.00512), appendix D, for v; Hoogeboom, Heek and Salimans 2023
(arXiv 2301.11093) for (4) at q = 1; Karras et al. 2022 (arXiv 2206.00364), section 5,
for (5): c_skip, c_out and c_in in their variables z_t / alpha and sigma / alpha.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusionlab.types import Array, Prediction, Schedule, lift


class Scales(NamedTuple):
    """alpha, sigma and their derivatives in t, all of one shape.

    Attributes:
      sigma_data: the standard deviation of the data, as told to the process.
    """

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array
    sigma_data: float = 1.0


class PredictionType(NamedTuple):
    """One space in which a network predicts.

    Attributes:
      to: (raw, z_t, Scales) -> Prediction.
      from_: (x, eps, Scales) -> what a perfect network would answer.
      eps_error_scale: Scales -> r with |eps - eps_hat|² = r |raw error|² at one z_t.
    """

    to: Callable[[Array, Array, Scales], Prediction]
    from_: Callable[[Array, Array, Scales], Array]
    eps_error_scale: Callable[[Scales], Array]


def _square(scales: Scales) -> Array:
    return scales.alpha**2 + scales.sigma**2


def _determinant(scales: Scales) -> Array:
    # Of the 2x2 system (1), (2); it is -alpha sigma logsnr' / 2, so it is never zero.
    return scales.alpha * scales.d_sigma - scales.d_alpha * scales.sigma


def _eps_to(raw: Array, z_t: Array, scales: Scales) -> Prediction:
    return Prediction((z_t - scales.sigma * raw) / scales.alpha, raw)


def _x_to(raw: Array, z_t: Array, scales: Scales) -> Prediction:
    return Prediction(raw, (z_t - scales.alpha * raw) / scales.sigma)


def _v_to(raw: Array, z_t: Array, scales: Scales) -> Prediction:
    square = _square(scales)
    return Prediction(
        (scales.alpha * z_t - scales.sigma * raw) / square,
        (scales.sigma * z_t + scales.alpha * raw) / square,
    )


def _velocity_to(raw: Array, z_t: Array, scales: Scales) -> Prediction:
    determinant = _determinant(scales)
    return Prediction(
        (scales.d_sigma * z_t - scales.sigma * raw) / determinant,
        (scales.alpha * raw - scales.d_alpha * z_t) / determinant,
    )


def _edm_variance(scales: Scales) -> Array:
    return scales.sigma**2 + (scales.alpha * scales.sigma_data) ** 2


def _edm_to(raw: Array, z_t: Array, scales: Scales) -> Prediction:
    alpha, sigma, data = scales.alpha, scales.sigma, scales.sigma_data
    variance = _edm_variance(scales)
    scaled = data * raw / jnp.sqrt(variance)
    return Prediction(
        alpha * data**2 / variance * z_t + sigma * scaled,
        sigma / variance * z_t - alpha * scaled,
    )


def _edm_from(x: Array, eps: Array, scales: Scales) -> Array:
    alpha, sigma, data = scales.alpha, scales.sigma, scales.sigma_data
    return (sigma * x / data - alpha * data * eps) / jnp.sqrt(_edm_variance(scales))


PREDICTIONS = {
    "eps": PredictionType(
        to=_eps_to,
        from_=lambda x, eps, scales: eps,
        eps_error_scale=lambda scales: jnp.ones_like(scales.alpha),
    ),
    "x": PredictionType(
        to=_x_to,
        from_=lambda x, eps, scales: x,
        eps_error_scale=lambda scales: (scales.alpha / scales.sigma) ** 2,
    ),
    "v": PredictionType(
        to=_v_to,
        from_=lambda x, eps, scales: scales.alpha * eps - scales.sigma * x,
        eps_error_scale=lambda scales: (scales.alpha / _square(scales)) ** 2,
    ),
    "velocity": PredictionType(
        to=_velocity_to,
        from_=lambda x, eps, scales: scales.d_alpha * x + scales.d_sigma * eps,
        eps_error_scale=lambda scales: (scales.alpha / _determinant(scales)) ** 2,
    ),
    "edm": PredictionType(
        to=_edm_to,
        from_=_edm_from,
        eps_error_scale=lambda scales: (
            (scales.alpha * scales.sigma_data) ** 2 / _edm_variance(scales)
        ),
    ),
}


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Equation 1 under a schedule, with a network that predicts in one space.

    Every `t` and `s` is in [0, 1], a scalar, `[B]`, or `[B, F]` with a time per frame.

    Attributes:
      schedule: t -> logsnr, alpha, sigma.
      prediction: what the raw network output means: eps, x, v, velocity or edm.
      sigma_data: standard deviation of the data, d of equation 5.
      scale_input: the network sees z_t / sqrt(alpha² d² + sigma²), of unit variance,
        which matters where alpha² + sigma² is far from 1.

    Raises:
      ValueError: `prediction` is another word, or sigma_data is not positive.
    """

    schedule: Schedule
    prediction: str
    sigma_data: float = 1.0
    scale_input: bool = False

    kind = "gaussian"

    def __post_init__(self):
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data: must be positive, got {self.sigma_data}.")
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction: unknown '{self.prediction}'; known: "
                f"{', '.join(sorted(PREDICTIONS))}."
            )

    def scales(self, t: Array) -> Scales:
        """Returns alpha, sigma, alpha', sigma', each shaped as t."""
        (t,) = _float32(t)
        primal, tangent = jax.jvp(self.schedule.alpha_sigma, (t,), (jnp.ones_like(t),))
        return Scales(*primal, *tangent, self.sigma_data)

    def _lifted(self, t: Array, ndim: int) -> Scales:
        return Scales(*(lift(q, ndim) for q in self.scales(t)[:4]), self.sigma_data)

    def decode(self, x: Array) -> Array:
        """Returns what the data look like: x itself."""
        return x

    def prior(self, key: Array, shape: tuple[int, ...], t: float = 1.0) -> Array:
        """Returns z_t, near noise, as if the data were N(0, sigma_data²)."""
        return self.prior_std(t) * jax.random.normal(key, shape, jnp.float32)

    def prior_std(self, t: float = 1.0) -> Array:
        """Returns the standard deviation of `prior` at t."""
        alpha, sigma = self.schedule.alpha_sigma(jnp.float32(t))
        return jnp.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)

    def prior_from(self, keys: Array, shape: tuple[int, ...], t: float = 1.0) -> Array:
        """Returns z_t `[B, *shape]`: example i depends on `keys[i]` alone."""
        return jax.vmap(lambda key: self.prior(key, shape, t))(keys)

    def corrupt(self, key: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """Returns (z_t, eps) of equation 1, both shaped as `x`."""
        (x,) = _float32(x)
        eps = jax.random.normal(key, x.shape, jnp.float32)
        return self.mix(x, eps, t), eps

    def mix(self, x: Array, eps: Array, t: Array) -> Array:
        """Returns z_t of equation 1 for a given eps."""
        x, eps, t = _float32(x, eps, t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return lift(alpha, x.ndim) * x + lift(sigma, x.ndim) * eps

    def network_input(self, z_t: Array, t: Array) -> Array:
        """Returns what the network sees of z_t `[B, ...]`; see `scale_input`."""
        if not self.scale_input:
            return z_t
        (z_t,) = _float32(z_t)
        return z_t / jnp.sqrt(_edm_variance(self._lifted(t, z_t.ndim)))

    def velocity(self, prediction: Prediction, t: Array) -> Array:
        """Returns dz_t/dt `[B, ...]` of the probability-flow ODE; equation 2."""
        scales = self._lifted(t, prediction.x.ndim)
        return scales.d_alpha * prediction.x + scales.d_sigma * prediction.eps

    def predict(self, raw: Array, z_t: Array, t: Array) -> Prediction:
        """Returns (x, eps) that a raw network output says, given z_t `[B, ...]`."""
        raw, z_t = _float32(raw, z_t)
        scales = self._lifted(t, z_t.ndim)
        return PREDICTIONS[self.prediction].to(raw, z_t, scales)

    def target(self, x: Array, eps: Array, t: Array) -> Array:
        """Returns what a perfect network would answer, shaped as `x`."""
        x, eps = _float32(x, eps)
        return PREDICTIONS[self.prediction].from_(x, eps, self._lifted(t, x.ndim))

    def eps_error_scale(self, t: Array) -> Array:
        """Returns r, shaped as t, with |eps - eps_hat|² = r |target - raw|²."""
        return PREDICTIONS[self.prediction].eps_error_scale(self.scales(t))

    def posterior(
        self,
        prediction: Prediction,
        z_t: Array,
        t: Array,
        s: Array,
        noise_exponent: float = 0.0,
    ) -> tuple[Array, Array]:
        """Returns mean and variance of a step from z_t to z_s, s < t.

        Args:
          prediction: its `x`, `[B, ...]`, is used.
          z_t: `[B, ...]` noisy data.
          t, s: the two times.
          noise_exponent: gamma of (4), in [0, 1]; 0 is q(z_s | z_t, x), exact for one
            data point; 1 is exact for N(0, sigma_data² I) data.

        Returns:
          Mean `[B, ...]`, and a variance that broadcasts against it.
        """
        x, z_t, t, s = _float32(prediction.x, z_t, t, s)
        change = self.schedule.logsnr(t) - self.schedule.logsnr(s)
        keep, replace = jnp.exp(change), -jnp.expm1(change)
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        alpha_s, sigma_s = self.schedule.alpha_sigma(s)
        from_z = lift(alpha_s * keep / alpha_t, z_t.ndim)
        from_x = lift(alpha_s * replace, z_t.ndim)
        q_t = sigma_t**2 + (alpha_t * self.sigma_data) ** 2
        q_s = sigma_s**2 + (alpha_s * self.sigma_data) ** 2
        variance = replace * jnp.exp(
            2.0 * (1.0 - noise_exponent) * jnp.log(sigma_s)
            + noise_exponent * (2.0 * jnp.log(sigma_t) + jnp.log(q_s / q_t))
        )
        return from_z * z_t + from_x * x, lift(variance, z_t.ndim)
