"""Whether a sampler's steps blow up the latent, found without a network.

On N(0, d²) data, d = sigma_data, the exact denoiser is linear,

    x_hat = alpha d² / V z_t,   eps_hat = sigma / V z_t,   V = alpha² d² + sigma²   (1)

so a step is z_s = a z_t + b noise, and the latent's variance obeys v_s = a² v_t + b².
It should stay at V. A step that is too long for its scheme multiplies what is there,
and a network asked about such a latent was never trained on it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array, Predict, Prediction, Process

# Accepted variance over the true one: anywhere, and of what the sample is made of.
MAX_RATIO, MAX_LAST_RATIO = 10.0, 2.0


def true_variance(process: Process, t: Array) -> Array:
    """Returns V of equation 1, shaped as t."""
    alpha, sigma = process.schedule.alpha_sigma(t)
    return (alpha * process.sigma_data) ** 2 + sigma**2


def denoiser(process: Process) -> Predict:
    """Returns the prediction of equation 1, elementwise for `t` as well."""
    std = process.sigma_data

    def predict(z_t: Array, t: Array) -> Prediction:
        alpha, sigma = process.schedule.alpha_sigma(t)
        share = z_t / true_variance(process, t)
        return Prediction(alpha * std**2 * share, sigma * share)

    return predict


def variance_ratios(
    process: Process,
    times: np.ndarray,
    factor: Callable[[Array, Array], tuple[Array, Array]],
    correct: Callable[[int, float], float] = lambda i, variance: variance,
) -> np.ndarray:
    """Returns v over V, `[N]`: before each of the N steps.

    Args:
      process: of the sampler.
      times: `[N + 1]`.
      factor: (t, s), both `[N]` -> a and b of every step.
      correct: (step, v_s) -> v_s after what else the step does.
    """
    with jax.ensure_compile_time_eval():
        t, s = (jnp.asarray(q, jnp.float32) for q in (times[:-1], times[1:]))
        # One program: as single operations, their compilation would take seconds.
        arrays = jax.jit(lambda t, s: (true_variance(process, t), *factor(t, s)))(t, s)
        arrays = [np.float64(q) for q in arrays]
    true, a, b = np.broadcast_arrays(*arrays)
    variance, found = true[0], [1.0]
    for i in range(len(times) - 2):
        variance = correct(i, a[i] ** 2 * variance + b[i] ** 2)
        found.append(variance / true[i + 1])
    return np.asarray(found)


def refuse(ratios: np.ndarray, max_last: float = MAX_RATIO) -> None:
    """Raises ValueError for a ratio above MAX_RATIO, or a last one above max_last."""
    worst, last = ratios.max(), ratios[-1]
    if worst <= MAX_RATIO and last <= max_last:
        return
    raise ValueError(
        f"num_steps: {len(ratios)} steps on this grid are unstable: on gaussian data "
        f"the latent's variance comes to {worst:.3g} times the true one, {last:.3g} "
        f"times before the last step; at most {MAX_RATIO:g} and {max_last:g} are "
        "accepted. Use more steps or another grid, such as 'logsnr' or 'rho'."
    )
