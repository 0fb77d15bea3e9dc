"""The reverse SDE in time: Euler-Maruyama, and predictor-corrector.

With f = alpha' / alpha and g² = -sigma² logsnr', dz = f z dt + g dw has the marginals
of z_t = alpha x + sigma eps. Its reverse, with score = -eps_hat / sigma and steps of
length d = t - s, is

    dz = (f z - g² score) dt + g dw                                                 (1)
    z_s = z_t - d (f z_t - sigma logsnr' eps_hat) + sigma sqrt(-logsnr' d) noise    (2)

Two other predictors of a step use the exact forward transition instead of f and g:
with a = alpha_t / alpha_s and c = 1 - exp(logsnr_t - logsnr_s),

    reverse_diffusion  z_s = (2 - a) z_t - sigma_t c eps_hat + sigma_t sqrt(c) noise
    ancestral          z_s ~ q(z_s | z_t, x_hat)                                    (3)

The corrector is Langevin's step at s, of a length e that gives the score and the noise
a certain ratio r of norms, over one example:

    z_s <- z_s + e score + sqrt(2 e) noise,   e = 2 a² (r |noise| / |score|)²       (4)

`check` refuses steps that blow up gaussian data; see `stability`. (2) does so where the
length times f is large, as near t = 1 for a cosine or flow schedule on a uniform grid:
alpha falls by a factor of 30 in the first of 100 steps. Equal steps in logsnr are fine.

Source: Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole 2021 (arXiv 2011.13456):
equation 6 for (1), appendices E and F for (3), and algorithms 2 to 5 for (4), where a²
is 1 for their variance-exploding and 1 - beta for their variance-preserving SDE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import base, grids, stability
from diffusionlab.types import Array, DataSpec, Predict, Prediction, Process

# q of the longest corrector step, e = sigma².
_MAX_SCALE = 0.5**0.5

_TINY = 1e-30


# A predictor: (process, prediction, z_t, t, s) -> mean of z_s, scale of its noise.
Predictor = Callable[..., tuple[Array, Array]]


def euler_maruyama(
    process: Process, prediction: Prediction, z: Array, t: Array, s: Array
) -> tuple[Array, Array]:
    """Returns mean and scale of equation 2."""
    schedule = process.schedule
    (alpha, sigma), (d_alpha, _) = jax.jvp(
        schedule.alpha_sigma, (t,), (jnp.ones_like(t),)
    )
    slope, span = schedule.derivative(t), t - s
    drift = d_alpha / alpha * z - sigma * slope * prediction.eps
    return z - span * drift, sigma * jnp.sqrt(-slope * span)


def reverse_diffusion(
    process: Process, prediction: Prediction, z: Array, t: Array, s: Array
) -> tuple[Array, Array]:
    """Returns mean and scale of the first predictor of equation 3."""
    alpha_t, sigma_t = process.schedule.alpha_sigma(t)
    alpha_s, _ = process.schedule.alpha_sigma(s)
    change = -jnp.expm1(-2.0 * base.half_logsnr_step(process, t, s))
    mean = (2.0 - alpha_t / alpha_s) * z - sigma_t * change * prediction.eps
    return mean, sigma_t * jnp.sqrt(change)


def ancestral(
    process: Process, prediction: Prediction, z: Array, t: Array, s: Array
) -> tuple[Array, Array]:
    """Returns mean and scale of the second predictor of equation 3."""
    mean, variance = process.posterior(prediction, z, t, s)
    return mean, jnp.sqrt(variance)


PREDICTORS: dict[str, Predictor] = {
    "ancestral": ancestral,
    "reverse_diffusion": reverse_diffusion,
}


def langevin(
    process: Process,
    prediction: Prediction,
    z: Array,
    t: Array,
    s: Array,
    signal_to_noise: float,
    noise: Array,
) -> Array:
    """Returns z_s `[B, ...]` after a corrector step, equation 4.

    With score = -eps_hat / sigma the step is z - 2 q² sigma eps_hat + 2 q sigma noise,
    q = a r |noise| / |eps_hat|. It is limited to e = sigma², q² = 1/2, which a step
    exceeds in few dimensions only, where the ratio of the norms has a heavy tail.

    Args:
      prediction: at (z, s).
      z: the latent at s.
      t, s: of the predictor's step.
      signal_to_noise: r.
      noise: `[B, ...]`, standard normal.
    """
    ratio = _norm(noise) / jnp.maximum(_norm(prediction.eps), _TINY)
    q = _corrector_scale(process, t, s, signal_to_noise, ratio)
    _, sigma_s = process.schedule.alpha_sigma(s)
    return z + 2.0 * q * sigma_s * (noise - q * prediction.eps)


def _norm(z: Array) -> Array:
    return jnp.sqrt(jnp.sum(z**2, axis=tuple(range(1, z.ndim)), keepdims=True))


def _corrector_scale(
    process: Process, t: Array, s: Array, signal_to_noise: float, ratio: Array
) -> Array:
    """Returns q for a ratio of norms |noise| / |eps_hat|."""
    alpha_t, _ = process.schedule.alpha_sigma(t)
    alpha_s, _ = process.schedule.alpha_sigma(s)
    return jnp.minimum(alpha_t / alpha_s * signal_to_noise * ratio, _MAX_SCALE)


def _factor(process: Process, predictor: Predictor):
    """Returns (t, s) -> what a step does to z, as `stability` asks."""

    def factor(t: Array, s: Array) -> tuple[Array, Array]:
        z = jnp.ones_like(t)
        exact = stability.denoiser(process)(z, t)
        return predictor(process, exact, z, t, s)

    return factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama:
    """Equation 2; the result is the x_hat of the last step.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform, which `check` refuses for most schedules.

    Raises:
      ValueError: num_steps is below 1.
    """

    num_steps: int
    grid: grids.Grid | None = None

    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError where the steps blow up gaussian data."""
        ratios = stability.variance_ratios(
            process, self.times(process.schedule), _factor(process, euler_maruyama)
        )
        stability.refuse(ratios, stability.MAX_LAST_RATIO)

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
        prediction = predict(state.z, t)
        mean, scale = euler_maruyama(process, prediction, state.z, t, s)
        noise = base.normal(keys, state.z.shape[1:])
        return base.State(mean + scale * noise, prediction.x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorCorrector:
    """A step of equation 3, then `num_corrector` of equation 4 but at t = 0.

    The result is the x_hat of the last step. In D dimensions a step length that depends
    on the score's own norm changes the variance by a share of up to 2 / D.

    Attributes:
      num_steps: steps of the predictor.
      grid: the times; None is uniform.
      predictor: 'ancestral' or 'reverse_diffusion'.
      num_corrector: Langevin steps after each predictor step, one evaluation each.
      signal_to_noise: r of equation 4.

    Raises:
      ValueError: num_steps is below 1, predictor is another word, or another field is
        negative.
    """

    num_steps: int
    grid: grids.Grid | None = None
    predictor: str = "ancestral"
    num_corrector: int = 1
    signal_to_noise: float = 0.16

    times, init, final = base.times, base.init, base.final

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        if self.predictor not in PREDICTORS:
            raise ValueError(
                f"predictor: unknown '{self.predictor}'; known: "
                f"{', '.join(sorted(PREDICTORS))}."
            )
        for name in ("num_corrector", "signal_to_noise"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}: must be at least 0, got {getattr(self, name)}."
                )

    @property
    def num_evaluations(self) -> int:
        """One for each predictor step, and the correctors' between them."""
        return self.num_steps + (self.num_steps - 1) * self.num_corrector

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError where the steps blow up gaussian data."""
        times = self.times(process.schedule)
        factor = _factor(process, PREDICTORS[self.predictor])

        def corrector(t, s):
            _, sigma = process.schedule.alpha_sigma(s)
            share = sigma / stability.true_variance(process, s)
            q = _corrector_scale(process, t, s, self.signal_to_noise, 1.0)
            return q, sigma, share

        with jax.ensure_compile_time_eval():
            t, s = (jnp.asarray(q, jnp.float32) for q in (times[:-1], times[1:]))
            q, sigma, share = (np.float64(a) for a in jax.jit(corrector)(t, s))

        def correct(i: int, variance: float) -> float:
            for _ in range(self.num_corrector):
                # |eps_hat|² is share² variance for each of many dimensions.
                q_i = min(q[i] / (share[i] * variance**0.5), _MAX_SCALE)
                keep = 1.0 - 2.0 * q_i**2 * sigma[i] * share[i]
                variance = keep**2 * variance + (2.0 * q_i * sigma[i]) ** 2
            return variance

        ratios = stability.variance_ratios(process, times, factor, correct)
        stability.refuse(ratios, stability.MAX_LAST_RATIO)

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
        shape = state.z.shape[1:]
        prediction = predict(state.z, t)
        predictor = PREDICTORS[self.predictor]
        mean, scale = predictor(process, prediction, state.z, t, s)
        z_s = mean + scale * base.normal(base.fold(keys, 0), shape)

        def correct(z_s):
            def body(z, use):
                noise = base.normal(base.fold(keys, use), shape)
                answer = predict(z, s)
                r = self.signal_to_noise
                return langevin(process, answer, z, t, s, r, noise), None

            return jax.lax.scan(body, z_s, jnp.arange(1, self.num_corrector + 1))[0]

        if self.num_corrector:
            z_s = jax.lax.cond(base.is_last(s), lambda z: z, correct, z_s)
        return base.State(z_s, prediction.x)
