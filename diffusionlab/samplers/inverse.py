"""Samplers used backwards, from the middle, and with a part of the answer known.

Inversion. A deterministic sampler on ascending times takes data to its code:

    z_0 = alpha_0 x,   z_1 = solve(z_0, 0 -> 1)                                     (1)

From the middle. Noise x to time t_0 and sample down from there:

    z_{t_0} = alpha x + sigma eps,   x' = solve(z_{t_0}, t_0 -> 0)                  (2)

Replacement. With `known` 1 where x is given, after every step to s

    z_s <- known (alpha_s x + sigma_s eps) + (1 - known) z_s                        (3)

This is biased: the unknown part is stepped as if the noisy known part were all that is
known. Repeating a step pulls the two together. In between, z_s is noised again, with
c = 1 - exp(logsnr_t - logsnr_s):

    z_t = (alpha_t / alpha_s) z_s + sigma_t sqrt(c) eps                             (4)

Reconstruction guidance. With p(x_known | z_t) taken to be N(x_hat, (sigma/alpha)² I),
Bayes' rule adds its score to that of z_t, which for x_hat means

    x~ = x_hat - (weight alpha / 2) grad_z |known (x - x_hat(z))|²,
    eps~ = (z - alpha x~) / sigma                                                   (5)

It holds for any alpha and sigma. The true variance of x given z_t is smaller than
(sigma/alpha)², so weight 1 is rather too weak at high noise.

Source: Song, Meng and Ermon 2021 (arXiv 2010.02502), section 4.3, for (1); Meng et al.
2021, SDEdit (arXiv 2108.01073), algorithm 1, for (2); Song et al. 2021
(arXiv 2011.13456), appendix I.2, for (3); Lugmayr et al. 2022, RePaint
(arXiv 2201.09865), algorithm 1 with jumps of one step, for (4); Ho et al. 2022, Video
diffusion models (arXiv 2204.03458), equation 8, for (5).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import types
from diffusionlab.samplers import base, stability
from diffusionlab.types import Array, Predict, Prediction, Process, Sampler

# Uses of a sample's key that no step has: steps take 0, 1, 2, ...
_START, _KNOWN, _AGAIN = 2**31 - 1, 2**31 - 2, 2**31 - 3


def encode(sampler: Sampler, process: Process, predict: Predict, x: Array) -> Array:
    """Returns the code z_1 of x `[B, ...]`; equation 1 on the sampler's own times."""
    keys = _unused_keys(len(x))
    times = sampler.times(process.schedule)[::-1]
    alpha, _ = process.schedule.alpha_sigma(jnp.float32(times[0]))
    return base.solve(sampler, process, predict, alpha * x, times, keys).z


def decode(sampler: Sampler, process: Process, predict: Predict, z: Array) -> Array:
    """Returns x from z_1 `[B, ...]` by a deterministic sampler on its own times."""
    times, keys = sampler.times(process.schedule), _unused_keys(len(z))
    return sampler.final(base.solve(sampler, process, predict, z, times, keys))


def _unused_keys(number: int) -> Array:
    # A deterministic sampler is given keys as any other, and does not look at them.
    return jax.random.split(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)), number)


def cut(times: np.ndarray, start: float) -> np.ndarray:
    """Returns `times` from exactly `start` in (0, 1] on.

    Where they ascend, as those of 'restart', the way up to a time above `start` and
    down again to where it began is left out as a whole; the others stay as they are.

    Raises:
      ValueError: start is outside (0, 1].
    """
    if not 0 < start <= 1:
        raise ValueError(f"start: must be in (0, 1], got {start}.")
    start = np.float32(start)
    # Times from `end` up are left out; inf where none are.
    found, end, before = [start], start, np.float32(np.inf)
    for t in times:
        if np.isinf(end) and t > max(start, before):
            end = before
        if t < end:
            found.append(t)
            end = np.float32(np.inf)
        before = t
    return np.asarray(found, np.float32)


def from_middle(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    x: Array,
    start: float,
    keys: Array,
) -> Array:
    """Returns x' of equation 2, `[B, ...]`, on the sampler's times cut at `start`."""
    times = cut(sampler.times(process.schedule), start)
    eps = base.normal(base.fold(keys, _START), x.shape[1:])
    z = process.mix(x, eps, jnp.float32(times[0]))
    return sampler.final(base.solve(sampler, process, predict, z, times, keys))


def replacement(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    x: Array,
    known: Array,
    keys: Array,
    resample: int = 1,
) -> Array:
    """Returns samples `[B, ...]` whose known part was replaced at every step.

    The known part of the result is the sampler's, near x but not equal to it.

    Args:
      sampler: with its own times; `resample` above 1 starts a sampler's memory anew.
      process: knows the schedule.
      predict: `(z_t, t) -> Prediction`.
      x: `[B, ...]`, of which only the known part is used.
      known: 1 where x is given, else 0; broadcasts against x.
      keys: `[B]`.
      resample: how often each step is made, equation 4 in between; but the last, and
        steps towards noise, are made once.
    """
    times = jnp.asarray(sampler.times(process.schedule))
    shape = x.shape[1:]

    def put(z, t, use):
        eps = base.normal(base.fold(base.fold(keys, _KNOWN), use), shape)
        return jnp.where(known, process.mix(x, eps, t), z)

    def once(state, use, t, s):
        step_keys = base.fold(keys, use + 1)
        state = sampler.step(process, predict, state, t, s, step_keys)
        return state._replace(z=put(state.z, s, use + 1))

    def body(state, step):
        index, t, s = step

        def again(j, state):
            z = _noised_again(process, state.z, s, t, keys, index * resample + j)
            return once(sampler.init(z, t), index * resample + j, t, s)

        state = once(state, index * resample, t, s)
        if resample > 1:
            # After the step to clean data there is nothing left to agree on, and
            # from a noisier s (4) has no way to t.
            number = jnp.where(base.is_last(s) | (s >= t), 1, resample)
            state = jax.lax.fori_loop(1, number, again, state)
        return state, None

    z = put(process.prior_from(base.fold(keys, 0), shape, times[0]), times[0], 0)
    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    state, _ = jax.lax.scan(body, sampler.init(z, times[0]), steps)
    return sampler.final(state)


def _noised_again(process, z_s, s, t, keys, use) -> Array:
    """Returns z_t of equation 4."""
    alpha_s, _ = process.schedule.alpha_sigma(s)
    alpha_t, sigma_t = process.schedule.alpha_sigma(t)
    change = -jnp.expm1(-2.0 * base.half_logsnr_step(process, t, s))
    noise = base.normal(base.fold(base.fold(keys, _AGAIN), use), z_s.shape[1:])
    return alpha_t / alpha_s * z_s + sigma_t * jnp.sqrt(change) * noise


def reconstruction(
    process: Process, predict: Predict, x: Array, known: Array, weight: float = 1.0
) -> Predict:
    """Returns `predict` of equation 5; each call also differentiates the network.

    Args:
      process: knows the schedule.
      predict: `(z_t, t) -> Prediction`, differentiable in z_t.
      x: `[B, ...]`, of which only the known part is used.
      known: 1 where x is given, else 0; broadcasts against x.
      weight: of the guidance; steps become unstable from 2 on.
    """

    def guided(z_t: Array, t: Array) -> Prediction:
        prediction, pull = jax.vjp(lambda z: tuple(predict(z, t)), z_t)
        x_hat, eps = prediction
        error = jnp.where(known, x - x_hat, 0.0)
        (gradient,) = pull((error, jnp.zeros_like(eps)))
        # Adaptive samplers have a time for each example.
        alpha, sigma = process.schedule.alpha_sigma(types.lift(t, z_t.ndim))
        change = weight * alpha * gradient
        return Prediction(x_hat + change, eps - alpha / sigma * change)

    return guided


@functools.lru_cache(maxsize=32)
def is_deterministic(
    sampler: Sampler, process: Process, shape: tuple[int, ...]
) -> bool:
    """Whether two keys give one result, down and up the sampler's times of `process`.

    This is tried, on data N(0, sigma_data²) of `shape`, and not declared, so it holds
    for every sampler with any options: one with churn between noise levels that its
    times do not meet draws no noise. Tokens are always drawn.
    """
    if getattr(process, "kind", "gaussian") == "categorical":
        return False
    times = sampler.times(process.schedule)
    exact = stability.denoiser(process)

    def predict(z_t, t):
        return exact(z_t, types.lift(t, z_t.ndim))

    @jax.jit
    def run(keys):
        z = jnp.linspace(-1.0, 1.0, 2 * int(np.prod(shape))).reshape(2, *shape)
        down = base.solve(sampler, process, predict, z, times, keys)
        up = base.solve(sampler, process, predict, z, times[::-1], keys)
        return down.z, sampler.final(down), up.z

    keys = jax.vmap(jax.random.wrap_key_data)(
        jnp.arange(8, dtype=jnp.uint32).reshape(4, 2)
    )
    results = zip(run(keys[:2]), run(keys[2:]), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in results)


def check_deterministic(
    sampler: Sampler, process: Process, shape: tuple[int, ...]
) -> None:
    """Raises ValueError for a sampler that draws noise: it has no inverse."""
    if not is_deterministic(sampler, process, shape):
        raise ValueError(
            f"sampler: {type(sampler).__name__} draws fresh noise, so no code leads "
            "back to the same data; take a deterministic one, as 'ddim' with eta=0."
        )
