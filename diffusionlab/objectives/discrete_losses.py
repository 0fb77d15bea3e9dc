"""What a denoiser of tokens pays for each of them, in nats.

In continuous time, t ~ U(0, 1), and in T steps from t to s:

    masked   -alpha' / (1 - alpha) [z = mask] (-log x_hat_x)                        (1)
             -alpha' / (1 - alpha) [z = mask] (sum_j y_j - 1 - log y_x)             (2)
             (alpha_s - alpha_t) / (1 - alpha_t) [z = mask] (-log x_hat_x)          (3)
    uniform  beta / K sum_{j != z} [ r^_j - r_j + r_j log(r_j / r^_j) ]             (4)
             KL(q(z_s | z_t, x) || q(z_s | z_t, leave_one_out))                     (5)

(1) and (4) are the ELBO of the two noises, with beta = -alpha' / alpha and r_j = p_j /
p_z, p = alpha x + (1 - alpha) / K; r^ is the same of leave_one_out. (4) with r^ from
the network, and (2), are score entropy: scores s_j = y_j alpha / (1 - alpha) of masked
tokens make (1) of it where y sums to 1. (3) and (5) are one of T steps; the last one,
s = 0, is -log x_hat_x of the denoiser at every position.

Source: Sahoo et al. 2024, MDLM (arXiv 2406.07524), and Shi et al. 2024, MD4
(arXiv 2406.04329), for (1) and (3); Lou et al. 2023, SEDD (arXiv 2310.16834), for (2)
and score entropy; Schiff et al. 2024 (arXiv 2412.10193) for (4); Austin et al. 2021,
D3PM (arXiv 2107.03006), for (5).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusionlab.processes.categorical import Categorical, log_one_hot
from diffusionlab.types import Array, CategoricalPrediction, lift

_TINY = 1e-30


class Answer(NamedTuple):
    """What a network said of z_t.

    Attributes:
      surprise: -log x_hat_x of the denoiser, `[B, ...]`; 0 where z_t says x.
      prediction: all of the denoiser; None where only x was asked for.
      raw: the network's output, for losses of scores.
    """

    surprise: Array
    prediction: CategoricalPrediction | None = None
    raw: Array | None = None


def read(
    process: Categorical,
    prediction: CategoricalPrediction,
    x: Array,
    z_t: Array,
    raw: Array | None = None,
) -> Answer:
    """Returns the answer that a prediction is, for tokens x `[B, ...]`."""
    surprise = -jnp.take_along_axis(prediction.logits, x[..., None], axis=-1)[..., 0]
    surprise = jnp.where(process.is_noise(z_t), surprise, 0.0)
    return Answer(surprise, prediction, raw)


def surprise(
    process: Categorical, answer: Answer, x: Array, z_t: Array, t: Array, s: Array
) -> Array:
    """Returns -log x_hat_x, `[B, ...]`."""
    return answer.surprise


def elbo(
    process: Categorical, answer: Answer, x: Array, z_t: Array, t: Array, s: Array
) -> Array:
    """Returns equation 1 or 4, `[B, ...]`.

    Args:
      process: says which.
      answer: to z_t; with a prediction under uniform noise.
      x, z_t: tokens `[B, ...]`, clean and at t.
      t: `[B]`; at t = 0 itself equation 1 has no masked token.
      s: not looked at.
    """
    if process.is_masked:
        return reveal_rate(process, t, x.ndim) * answer.surprise
    log_x_hat = process.leave_one_out(answer.prediction, z_t, t)
    log_r_hat = _ratio(process.log_marginal(log_x_hat, t), z_t)
    return _rate_error(process, log_r_hat, x, z_t, t)


def score_entropy(
    process: Categorical, answer: Answer, x: Array, z_t: Array, t: Array, s: Array
) -> Array:
    """Returns equation 2, or 4 with the network's scores, `[B, ...]`.

    The arguments are those of `elbo`, `answer` with the raw output `[B, ..., K]`.
    """
    raw = answer.raw.astype(jnp.float32)
    if process.is_masked:
        # sum y - 1 - log y_x, its first part of second order in the sum's error.
        log_sum = jax.nn.logsumexp(raw, axis=-1)
        extra = jnp.where(process.is_noise(z_t), jnp.expm1(log_sum) - log_sum, 0.0)
        rate = reveal_rate(process, t, x.ndim)
        return rate * (answer.surprise + extra)
    own = jax.nn.one_hot(z_t, process.num_tokens)
    return _rate_error(process, jnp.where(own > 0, 0.0, raw), x, z_t, t)


def score_surprise(
    process: Categorical, answer: Answer, x: Array, z_t: Array, t: Array
) -> Array:
    """Returns -log of what scores say of x near t = 0, `[B, ...]`, for uniform noise.

    There leave_one_out is (p - (1 - alpha) / K) / alpha: of scores that
    are not exact its logarithm may have no value, or gradients beyond all bounds. Here
    p itself is in its place. As any distribution does, it closes the bound, higher by
    terms of order 1 - alpha.
    """
    own = log_one_hot(z_t, process.num_tokens)
    scores = jnp.where(own < 0, answer.raw.astype(jnp.float32), 0.0)
    logits = jax.nn.log_softmax(scores + process.log_marginal(own, t))
    return -jnp.take_along_axis(logits, x[..., None], axis=-1)[..., 0]


def prior(process: Categorical, t: Array) -> Array:
    """Returns KL(q(z_t | x) || 1/K) of one token, whatever it is, shaped as t."""
    k = process.num_tokens
    wrong = jnp.maximum(process.schedule.noise(t) / k, _TINY)
    each = [jnp.log(share) for share in (process.schedule.alpha(t) + wrong, wrong)]
    right, rest = (_divergence(log_q, -jnp.log(k)) for log_q in each)
    return right + (k - 1) * rest


def steps(
    process: Categorical, answer: Answer, x: Array, z_t: Array, t: Array, s: Array
) -> Array:
    """Returns equation 3 or 5 of the step from t to s, `[B, ...]`; their sum bounds.

    The arguments are those of `elbo`, and s `[B]`; s = 0 is the last step.
    """
    is_last = lift(s, x.ndim) <= 0
    if process.is_masked:
        reveal = jnp.exp(process.log_reveal(t, s, x.ndim)[0])
        return jnp.where(is_last, 1.0, reveal) * answer.surprise
    log_x_hat = process.leave_one_out(answer.prediction, z_t, t)
    log_q = process.posterior(log_one_hot(x, process.num_tokens), z_t, t, s)
    log_p = process.posterior(log_x_hat, z_t, t, s)
    error = _divergence(log_q, log_p).sum(-1)
    return jnp.where(is_last, answer.surprise, error)


def reveal_rate(process: Categorical, t: Array, ndim: int) -> Array:
    """Returns -alpha' / (1 - alpha), to be multiplied with tokens of `ndim` axes."""
    noise = jnp.maximum(process.one_minus_alpha(t, ndim), _TINY)
    return -process.alpha_derivative(t, ndim) / noise


def _ratio(log_p: Array, z_t: Array) -> Array:
    """Returns log(p_j / p_z), `[B, ..., K]`."""
    return log_p - jnp.take_along_axis(log_p, z_t[..., None], axis=-1)


def _rate_error(
    process: Categorical, log_r_hat: Array, x: Array, z_t: Array, t: Array
) -> Array:
    """Returns equation 4 of log r^ `[B, ..., K]`, which is 0 at z."""
    log_p = process.log_marginal(log_one_hot(x, process.num_tokens), t)
    error = _divergence(_ratio(log_p, z_t), log_r_hat).sum(-1)
    alpha = jnp.maximum(process.alpha(t, x.ndim), _TINY)
    beta = -process.alpha_derivative(t, x.ndim) / alpha
    return beta / process.num_tokens * error


def _divergence(log_q: Array, log_p: Array) -> Array:
    """Returns p - q + q log(q / p), never negative, of what need not sum to 1.

    Where the two are close it is of second order, and so must be its rounding: near
    t = 1 the factor beta has no bound, and nor has T.
    """
    q, log_ratio = jnp.exp(log_q), log_p - log_q
    is_close = jnp.abs(log_ratio) < 1
    small = jnp.where(is_close, log_ratio, 0.0)
    return jnp.where(
        is_close,
        q * (jnp.expm1(small) - small),
        jnp.exp(log_p) - q - q * log_ratio,
    )
