"""Covariance-aware sampling: DDIM with the noise that it leaves out.

A DDIM step is linear in the clean data, z_s = (sigma_s / sigma_t) z_t + kappa x with
kappa = alpha_s - alpha_t sigma_s / sigma_t, and inserts x_hat = E[x | z_t]. If x came
from p(x | z_t) instead, z_t ~ q(z_t) would give z_s ~ q(z_s) exactly, for any step and
any data. DDIM keeps the mean of that step and drops its covariance kappa² Sigma, where
Sigma = Cov[x | z_t]; its samples vary too little when the steps are few. Here

    Sigma = (sigma_t² / alpha_t) J,   J = d x_hat / d z_t                           (1)
    z_s = (sigma_s / sigma_t) z_t + kappa (x_hat + eta Sigma^(1/2) xi)              (2)

(1) is Tweedie's formula of second order. With eta = 1, (2) has the mean and covariance
of the exact step, for any data; for gaussian data it is exact in law at any number of
steps. kappa is O(t - s), so the total of the noise vanishes as 1 / N: the limit is the
probability-flow ODE. Nothing needs alpha² + sigma² = 1.

A basis (`samplers/bases.py`) draws Sigma^(1/2) xi, most of them from a single
Jacobian-vector product, which returns x_hat as well.

Source: Schioppa and Salimans 2026, Covariance-aware sampling for diffusion models
(arXiv 2605.13910); how much of this is theirs, `Covariance` says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import base, bases, grids
from diffusionlab.types import Array, DataSpec, Predict, Prediction, Process

# Sigma <= c holds for a gaussian, and on average; one z_t may exceed it.
_MARGIN = 4.0
_WORKING = "dct_global, pixel_isotropic, lanczos, oracle"


class Derivative(NamedTuple):
    """One way to multiply by J.

    Attributes:
      at: (z -> Prediction, z_t, h) -> Tangent; h is the step of a difference.
      evaluations: extra evaluations of the network per product J v.
      plain: whether these are evaluations like any other, and not of a derivative.
    """

    at: Callable[[Callable[[Array], Prediction], Array, float], bases.Tangent]
    evaluations: int
    plain: bool


def _forward_mode(denoise: Callable, z_t: Array, _: float) -> bases.Tangent:
    def x_first(z):
        prediction = denoise(z)
        return prediction.x, prediction

    def product(v):
        _, derivative, prediction = jax.jvp(x_first, (z_t,), (v,), has_aux=True)
        return prediction, derivative

    def linearise():
        _, apply, prediction = jax.linearize(x_first, z_t, has_aux=True)
        return prediction, apply

    return bases.Tangent(product, linearise)


def _difference(
    denoise: Callable, z_t: Array, size: float, central: bool
) -> bases.Tangent:
    def linearise():
        prediction = denoise(z_t)

        def apply(v):
            # The change has the root mean square `size`, whatever the length of v.
            square = jnp.mean(v**2, axis=tuple(range(1, v.ndim)), keepdims=True)
            h = size * jax.lax.rsqrt(jnp.maximum(square, 1e-30))
            ahead = denoise(z_t + h * v).x
            if central:
                return (ahead - denoise(z_t - h * v).x) / (2.0 * h)
            return (ahead - prediction.x) / h

        return prediction, apply

    def product(v):
        prediction, apply = linearise()
        return prediction, apply(v)

    return bases.Tangent(product, linearise)


DERIVATIVES = {
    "jvp": Derivative(_forward_mode, evaluations=1, plain=False),
    "central": Derivative(functools.partial(_difference, central=True), 2, plain=True),
    "one_sided": Derivative(
        functools.partial(_difference, central=False), 1, plain=True
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariance:
    """Equation 2, with Sigma from products with the Jacobian of the prediction.

    J is that of the guided prediction. It need not be positive then, and a trained
    network's is not quite symmetric: negative eigenvalues count as 0. As alpha -> 0,
    Sigma = sigma² J / alpha magnifies every error of J, of training as of bfloat16, by
    1 / alpha. Left alone, it ruins the first step of a trained network, so the
    estimate is not used where logsnr is below `logsnr_reliable`. Unless
    `data_variances` are given, the sampler is plain DDIM there and not exact from t = 1
    on: with the exact denoiser of N(0, I) data, cosine schedule and uniform grid, the
    defaults leave the variances 0, 0.75, 0.91 and 0.97 in 1, 2, 4 and 8 steps. With
    data_variances, or for an exact denoiser logsnr_reliable=-1e9, they are 1.

    From the abstract of the paper, arXiv 2605.13910: DDIM is extended by the covariance
    of x given z_t, which comes from Tweedie's formula of second order and a structured
    decomposition in Fourier space, at one Jacobian-vector product per step, for models
    of pixels. Derived here, without sight of the paper's equations: the module's
    equation 2 and what it is exact for, the estimate and its probes, every basis, the
    bounds, and the first and the last step.

    Attributes:
      num_steps: steps, each one evaluation and the products of the basis.
      grid: the times; None is uniform.
      basis: how the noise is drawn; None is dct_global, for images `[H, W, C]`.
      eta: share of the noise in every step, in [0, 1]; 0 is DDIM to the last bit, and
        takes no product.
      eta_last: what the last step keeps of eta, in [0, 1]. Its noise lands on the
        sample itself: 1 gives the right variance, and of images more varied ones; 0
        denoised ones, which look cleaner and lack variance again. The last step then
        takes no product.
      derivative: 'jvp', or finite differences for networks without a forward-mode
        derivative: 'central' at two evaluations per product, or 'one_sided' at one.
      difference: by how much finite differences change z_t, as the root mean square
        over its entries. It has to stay well above the network's own rounding: 0.1 to
        0.3, and central, where the network computes in bfloat16, of which 1e-2 is
        about the rounding error of z_t itself.
      logsnr_reliable: below it, the variance is that of the data where it is known, and
        the step is one of DDIM where it is not. For an exact denoiser, -1e9.
      data_variances: variance c of the data per coefficient of the basis, nested as
        these are or broadcasting to them, from `frames.data_variances`; Sigma is at
        most 4 c then. Empty is unknown.

    Raises:
      ValueError: a number is out of its range, or `derivative` another word.
    """

    num_steps: int
    grid: grids.Grid | None = None
    basis: bases.Basis | None = None
    eta: float = 1.0
    eta_last: float = 1.0
    derivative: str = "jvp"
    difference: float = 1e-2
    logsnr_reliable: float = -8.0
    data_variances: tuple = ()

    times, init, final = base.times, base.init, base.final

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        for name in ("eta", "eta_last"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}: must be in [0, 1], got {getattr(self, name)}."
                )
        if self.derivative not in DERIVATIVES:
            raise ValueError(
                f"derivative: unknown '{self.derivative}'; known: "
                f"{', '.join(DERIVATIVES)}."
            )
        if self.difference <= 0:
            raise ValueError(f"difference: must be positive, got {self.difference}.")

    @property
    def num_evaluations(self) -> int:
        """Network evaluations of one sample, a Jacobian-vector product being one."""
        return self.num_steps + self._products * self._rule.evaluations

    @property
    def num_predictions(self) -> int:
        """The same count where a Jacobian-vector product is free."""
        products = self._products if self._rule.plain else 0
        return self.num_steps + products * self._rule.evaluations

    @property
    def _rule(self) -> Derivative:
        return DERIVATIVES[self.derivative]

    @property
    def _basis(self) -> bases.Basis:
        return self.basis or bases.DctGlobal()

    @property
    def _products(self) -> int:
        noisy_steps = self.num_steps - (not self.eta_last) if self.eta else 0
        return noisy_steps * self._basis.num_products

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError where the basis does not suit examples of this shape."""
        if self.basis is None and len(spec.shape) != 3:
            raise ValueError(
                "basis: the default, dct_global, is for images [H, W, C], and an "
                f"example is {list(spec.shape)}; name one of: {_WORKING}."
            )
        try:
            self._basis.check(spec.shape)
        except ValueError as error:
            raise ValueError(f"basis.{error}") from None
        if self.data_variances:
            self._check_variances(spec.shape)

    def _check_variances(self, shape: tuple[int, ...]) -> None:
        if not hasattr(self._basis, "frame"):
            raise ValueError(
                "data_variances: are per coefficient, and this basis has none; use "
                "dct_global, dct_block, dct_conv, fft_global or pixel_isotropic."
            )
        size = self._basis.frame(shape).size
        given = np.shape(self.data_variances)
        try:
            fits = np.broadcast_shapes(given, size) == size
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"data_variances: must broadcast to the coefficients {list(size)}, got "
                f"{list(given)}."
            )

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
        last = base.is_last(s)

        def denoise(z):
            return predict(z, t)

        def without(z_t):
            return denoise(z_t), jnp.zeros_like(z_t)

        def with_noise(z_t):
            return self._basis.draw(
                self._rule.at(denoise, z_t, self.difference),
                keys,
                z_t.shape[1:],
                lambda q: self._variances(process, q, t),
            )

        if not self.eta:
            (x, eps), noise = without(state.z)
        elif self.eta_last:
            (x, eps), noise = with_noise(state.z)
            noise *= self.eta * jnp.where(last, self.eta_last, 1.0)
        else:
            (x, eps), noise = jax.lax.cond(last, without, with_noise, state.z)
            noise *= self.eta
        # The first line of a DDIM step, in the same words.
        z_s = process.mix(x, eps, s)
        if self.eta:
            z_s += base.ddim_weight(process, t, s) * noise
            x += jnp.where(last, noise, 0.0)
        return base.State(z_s, x)

    def _variances(self, process: Process, q: Array, t: Array) -> Array:
        """Returns the eigenvalues of Sigma for those of J; equation 1."""
        alpha, sigma = process.schedule.alpha_sigma(t)
        # q is O(alpha) as alpha -> 0, where sigma² / alpha may overflow.
        estimate = sigma**2 * (jnp.maximum(q, 0.0) / alpha)
        reliable = process.schedule.logsnr(t) >= self.logsnr_reliable
        if not self.data_variances:
            return jnp.where(reliable, estimate, 0.0)
        data = jnp.asarray(self.data_variances, jnp.float32)
        return jnp.where(reliable, jnp.minimum(estimate, _MARGIN * data), data)
