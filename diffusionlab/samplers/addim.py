"""aDDIM: DDIM that makes up for the norm it loses, with one evaluation per step.

DDIM puts the mean x_hat where a perfect sampler has a draw x* from p(x | z_t). With
kappa = alpha_s - alpha_t sigma_s / sigma_t, the draw adds kappa² tr Var[x | z_t] to the
squared norm of z_s. aDDIM puts it on the predicted noise, per example:

    z_s = alpha_s x_hat + sqrt(sigma_s² + kappa² xvar / mean(eps_hat²)) eps_hat     (1)
    xvar = numerator / (offset + SNR_t)                                             (2)

Equation 2 is the posterior variance of N(0, 1 / offset) data times the numerator; the
default is a tenth of that of N(0, 1/2) data. The step to clean data is (1) with
alpha_s = kappa = 1 and sigma_s = 0.

(1) counts x_hat and eps_hat as orthogonal. They are not: for an exact denoiser their
mean product is positive, so the full variance, numerator 1, overshoots.

Source: Heek, Hoogeboom and Salimans 2024 (arXiv 2403.06807), section 3.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, Predict, Process

# Keeps a prediction without any noise from dividing by zero.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addim:
    """Equation 1; the result is that of its last step, to clean data.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      numerator, offset: of equation 2; a numerator of 0 is DDIM.
      posterior_variance: a constant xvar instead of equation 2.

    Raises:
      ValueError: num_steps is below 1, numerator or posterior_variance is negative, or
        offset is not positive.
    """

    num_steps: int
    grid: grids.Grid | None = None
    numerator: float = 0.1
    offset: float = 2.0
    posterior_variance: float | None = None

    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        for name in ("numerator", "posterior_variance"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: must be at least 0, got {value}.")
        if self.offset <= 0:
            raise ValueError(f"offset: must be positive, got {self.offset}.")

    def variance(self, logsnr: Array) -> Array:
        """Returns xvar, shaped as logsnr."""
        if self.posterior_variance is not None:
            return jnp.full_like(logsnr, self.posterior_variance)
        return self.numerator / (self.offset + jnp.exp(logsnr))

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s, both scalars; deterministic: `keys` is not used."""
        x, eps = predict(state.z, t)
        alpha_s, sigma_s = process.schedule.alpha_sigma(s)
        mean = jnp.mean(eps**2, axis=tuple(range(1, eps.ndim)), keepdims=True)
        # The norm that a step to clean data, kappa = 1, would add.
        lost = self.variance(process.schedule.logsnr(t)) / jnp.maximum(mean, _TINY)
        kappa = base.ddim_weight(process, t, s)
        z_s = alpha_s * x + jnp.sqrt(sigma_s**2 + kappa**2 * lost) * eps
        return base.State(z_s, x + jnp.sqrt(lost) * eps)
