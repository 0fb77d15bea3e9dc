"""Losses of tokens under exact networks: the bounds are what theory says, pointwise.

Every expectation is a sum over all z, every integral over t a quadrature.
"""

import functools
import itertools
import math

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from diffusionlab.objectives import discrete_losses as losses
from diffusionlab.objectives.discrete import chain_times, nelbo
from diffusionlab.types import CategoricalPrediction

CHAIN, BITS, FAIR = enumerated.chain(), enumerated.bits(0.9), enumerated.bits()
CHAIN_X = np.array([[0, 0, 0], [2, 1, 0], [1, 2, 2]])
CHAIN_NATS = [1.139434, 4.422849, 3.324236]
T = np.array([1, 2, 4, 8, 16, 32])


def chains(joint, process, many_x, counts, alpha=lambda t: 1 - t):
    """The bounds of chains of `counts` steps, `[X, counts]`."""
    s, t = (
        np.concatenate([(np.arange(n) + first) / n for n in counts]) for first in (0, 1)
    )
    predict = oracles.oracle(joint, process)
    args = (joint, process, losses.steps, predict, many_x, t, alpha(t), s)
    each = oracles.expected(*args)
    return np.stack(
        [part.sum(-1) for part in np.split(each, np.cumsum(counts)[:-1], axis=-1)], -1
    )


def test_the_markov_chain_is_the_specified_one():
    np.testing.assert_allclose(CHAIN.entropy, 2.602681, atol=1e-6)
    found = [-CHAIN.log_prob(x) for x in CHAIN_X]
    np.testing.assert_allclose(found, CHAIN_NATS, atol=1e-6)


@pytest.mark.parametrize("schedule", oracles.SCHEDULES)
def test_masked_bound_is_the_probability_pointwise_under_every_schedule(schedule):
    process = oracles.process_of(CHAIN, "masked", schedule)
    found = oracles.bound(CHAIN, process, schedule, CHAIN_X)
    predict = oracles.oracle(CHAIN, process)
    x = jnp.asarray(CHAIN_X, jnp.int32)
    # Beyond the ends: one step from all masked, and the last.
    one = jnp.ones(3)
    hidden = jnp.full_like(x, process.mask)
    first = losses.read(process, predict(hidden, one), x, hidden).surprise.sum(-1)
    found = found + np.float64(process.schedule.alpha(one) * first)
    left = oracles.SCHEDULES[schedule][0].end
    last = oracles.expected(
        CHAIN, process, losses.surprise, predict, CHAIN_X, np.zeros(1), [1 - left]
    )
    found = found + last[:, 0]
    # Where alpha ends at e or eps that step is not exact: of second order in them.
    slack = 4e-6 if left or schedule == "log_linear" else 0
    np.testing.assert_allclose(found, CHAIN_NATS, atol=4e-6 + slack)
    if slack:
        assert np.all(found > np.array(CHAIN_NATS) - 4e-6)


def test_masked_bound_is_the_sum_over_mask_sets():
    # (n - 1)! (L - n)! / L! of -log P(x_i | x outside S), i in S, over sets S of n
    length = CHAIN.length
    total = np.zeros(len(CHAIN_X))
    for row, x in enumerate(CHAIN_X):
        for n in range(1, length + 1):
            for chosen in itertools.combinations(range(length), n):
                z = np.where(np.isin(np.arange(length), chosen), CHAIN.num_tokens, x)
                p = CHAIN.denoiser(z, 0.5, CHAIN.num_tokens)
                share = math.factorial(n - 1) * math.factorial(length - n)
                nats = -sum(math.log(p[i, x[i]]) for i in chosen)
                total[row] += share / math.factorial(length) * nats
    np.testing.assert_allclose(total, CHAIN_NATS, atol=1e-6)
    process = oracles.process_of(CHAIN, "masked")
    found = oracles.bound(CHAIN, process, "linear", CHAIN_X)
    np.testing.assert_allclose(found, total, atol=4e-6)


def test_chains_of_two_equal_bits_have_the_known_bound():
    process = oracles.process_of(FAIR, "masked")
    found = chains(FAIR, process, [[0, 0]], T[:4])[0]
    np.testing.assert_allclose(found, math.log(2) * (1 + 1 / T[:4]), atol=2e-6)
    np.testing.assert_allclose(found, [1.38629, 1.03972, 0.86643, 0.77979], atol=1e-5)
    # What the sampler of as many steps does is better than its bound.
    assert np.all(found >= -np.log(0.5 - 1 / (4 * T[:4])) - 2e-6)


def test_mean_bounds_of_masked_chains_have_the_known_gaps():
    process = oracles.process_of(CHAIN, "masked")
    found = CHAIN.probs @ chains(CHAIN, process, CHAIN.sequences, T)
    gap = [0.535749, 0.255906, 0.124961, 0.061732, 0.030679, 0.015293]
    np.testing.assert_allclose(found - CHAIN.entropy, gap, atol=3e-6)
    sampled = [0.535749, 0.135152, 0.037893, 0.010489, 0.002813, 0.000734]
    assert np.all(found - CHAIN.entropy >= np.array(sampled) - 3e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_uniform_bound_is_the_probability_pointwise(schedule):
    many_x = [[0, 0], [0, 1]]
    process = oracles.process_of(BITS, "uniform", schedule)
    found = oracles.bound(BITS, process, schedule, many_x, nodes=(64, 4.0))
    np.testing.assert_allclose(found, [0.798508, 2.995732], atol=2e-5)


def test_uniform_bound_of_three_tokens_is_the_probability_pointwise():
    process = oracles.process_of(CHAIN, "uniform")
    found = oracles.bound(CHAIN, process, "linear", CHAIN_X, nodes=(48, 4.0))
    np.testing.assert_allclose(found, CHAIN_NATS, atol=5e-5)


def test_a_denoiser_that_is_called_leave_one_out_has_the_known_wrong_bound():
    many_x = [[0, 0], [0, 1]]
    process = oracles.process_of(BITS, "uniform", prediction="leave_one_out")
    exact = oracles.oracle(BITS, process)

    def predict(z, t):
        return process.predict(exact(z, t).logits, z, t)

    found = oracles.bound(BITS, process, "linear", many_x, predict, nodes=(64, 4.0))
    np.testing.assert_allclose(found, [1.48945, 2.24634], atol=3e-5)


def test_chains_of_uniform_noise_bound_and_converge():
    process = oracles.process_of(BITS, "uniform")
    found = BITS.probs @ chains(BITS, process, BITS.sequences, T)
    # What z_1 keeps of x is nothing under linear alpha: only the chain's own gap.
    gap = found - BITS.entropy
    assert np.all(gap > 0)
    # One step is the product of fair bits.
    np.testing.assert_allclose(found[0], 2 * math.log(2), atol=2e-6)
    # It falls as 1 / T: the last ratio is near 2.
    assert np.all(np.diff(gap) < 0) and 1.8 < gap[-2] / gap[-1] < 2.2


def test_seen_tokens_cost_nothing_whatever_is_said_of_them():
    process = oracles.process_of(CHAIN, "masked")
    said = CategoricalPrediction(jnp.full((1, 3, 3), -math.log(3)))
    x, z = jnp.int32([[0, 1, 2]]), jnp.int32([[0, 3, 2]])
    found = losses.read(process, said, x, z).surprise
    np.testing.assert_allclose(found, [[0, math.log(3), 0]], rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def both(process, raw, x, z, t):
    """Score entropy and the ELBO of the denoiser that scores say."""
    answer = losses.read(process, process.predict(raw, z, t), x, z, raw)
    args = (process, answer, x, z, t, t)
    return losses.score_entropy(*args), losses.elbo(*args)


def test_score_entropy_of_exact_scores_is_the_masked_bound():
    process = oracles.process_of(CHAIN, "masked", "log_linear", "score")
    z = jnp.array([[3, 3, 3], [0, 3, 1], [3, 2, 3]])
    x = jnp.array([[0, 0, 2], [0, 1, 1], [1, 2, 2]])
    t = jnp.float32([0.9, 0.3, 0.01])
    x_hat = np.exp(np.float64(oracles.oracle(CHAIN, process)(z, t).logits))
    sigma = -np.log(1 - 0.999 * np.float64(t))[:, None]
    k = 1 / np.expm1(sigma)
    off = 1.3  # scores need not be exact for the identity of the two formulas
    for scale in (1.0, off):
        scores = scale * x_hat * k[..., None]
        own = np.take_along_axis(scores, np.asarray(x)[..., None], -1)[..., 0]
        rate = 0.999 / (1 - 0.999 * np.float64(t))[:, None]  # d sigma / d t
        with np.errstate(divide="ignore"):
            entropy = scores.sum(-1) - k * np.log(own) + k * (np.log(k) - 1)
        entropy = np.where(z == 3, rate * entropy, 0)
        # The network's output is the score without alpha / (1 - alpha).
        raw = jnp.float32(np.log(np.maximum(scores / k[..., None], 1e-30)))
        found, elbo = both(process, raw, x, z, t)
        np.testing.assert_allclose(found, entropy, rtol=2e-5)
        assert np.allclose(found, elbo, rtol=2e-5) == (scale == 1.0)


@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_last_step_is_the_denoisers_where_alpha_does_not_end_at_one(noise):
    process = oracles.process_of(CHAIN, noise, "linear_with_ends")
    x, t = jnp.int32([[0, 0, 0]]), jnp.float32([0.01])
    z = jnp.int32([[3, 0, 3]]) if process.is_masked else jnp.int32([[1, 0, 2]])
    answer = losses.read(process, oracles.oracle(CHAIN, process)(z, t), x, z)
    found = losses.steps(process, answer, x, z, t, jnp.zeros(1))
    np.testing.assert_allclose(found, answer.surprise, rtol=1e-6)
    # A step to anywhere else is less than that.
    near = losses.steps(process, answer, x, z, t, jnp.float32([1e-6]))
    assert np.all((near < 0.999 * found)[found > 0]) and found.max() > 0.1


def test_score_entropy_of_uniform_noise_is_its_bound():
    process = oracles.process_of(CHAIN, "uniform", prediction="score")
    z = jnp.asarray(CHAIN.sequences[:12], jnp.int32)
    x = jnp.asarray(CHAIN.sequences[5:17], jnp.int32)

    @jax.jit
    def scores(t):
        alone = jnp.log(oracles.enumerated(CHAIN, process, z, t, skip_own=True))
        log_p = process.log_marginal(alone, t)
        return log_p - jnp.take_along_axis(log_p, z[..., None], axis=-1)

    t = jnp.linspace(0.1, 0.9, 12)
    found, elbo = both(process, scores(t), x, z, t)
    np.testing.assert_allclose(found, elbo, rtol=1e-4, atol=1e-5)
    # Near t = 0 what scores say of x is what the denoiser says.
    t = jnp.full(12, 1e-4)

    @jax.jit
    def closing(raw):
        answer = losses.read(process, process.predict(raw, z, t), x, z, raw)
        return losses.score_surprise(process, answer, x, z, t), answer.surprise

    np.testing.assert_allclose(*closing(scores(t)), rtol=2e-3, atol=1e-4)


def test_reveal_probability_is_that_of_log_odds():
    # (alpha_s - alpha_t) / (1 - alpha_t) = -alpha_s expm1(g_t - g_s), g = logit alpha
    process = oracles.process_of(CHAIN, "masked", "cosine")
    t, s = jnp.float32([0.9, 0.5, 0.02]), jnp.float32([0.89, 0.1, 0.01])
    schedule = process.schedule
    change = np.float64(schedule.logsnr(t)) - np.float64(schedule.logsnr(s))
    found = np.exp(np.float64(process.log_reveal(t, s, 1)[0]))
    np.testing.assert_allclose(found, -schedule.alpha(s) * np.expm1(change), rtol=2e-5)


def test_steps_of_a_chain_are_all_chosen_and_no_others():
    t, s = chain_times(jnp.float32([0, 0.249, 0.25, 0.9999999, 1.0]), 4)
    np.testing.assert_array_equal(t, [0.25, 0.25, 0.5, 1, 1])
    np.testing.assert_array_equal(s, [0, 0, 0.25, 0.75, 0.75])


@pytest.mark.parametrize("num_timesteps", [0, 4])
@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_estimate_of_the_bound_is_unbiased(noise, num_timesteps):
    process = oracles.process_of(CHAIN, noise)
    count = 20_000
    x = jnp.broadcast_to(jnp.int32([2, 1, 0]), (count, 3))
    t = (jnp.arange(count) + 0.5) / count
    predict = oracles.oracle(CHAIN, process)
    found = jax.jit(
        lambda x, t: nelbo(process, predict, jax.random.key(0), x, t, num_timesteps)
    )(x, t)
    exact = CHAIN_NATS[1]
    if num_timesteps:
        exact = chains(CHAIN, process, [[2, 1, 0]], [num_timesteps])[0, 0]
    spread = np.std(found) / np.sqrt(count)
    assert spread < 0.1 * exact
    assert abs(found.mean() - exact) < 4 * spread
