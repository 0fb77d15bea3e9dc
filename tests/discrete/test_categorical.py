"""The process of tokens against enumerations, of both noises and every schedule."""

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import stats

from diffusionlab.processes import categorical
from diffusionlab.processes.categorical import NOISES, PREDICTIONS, Categorical
from diffusionlab.schedules import alpha as alphas
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import CategoricalPrediction, DataSpec

CHAIN = enumerated.chain()
K = 3
SPEC = DataSpec(shape=(3,), num_tokens=K)


def made(**changes):
    given = {"spec": SPEC, "schedule": alphas.Linear()} | changes
    return Categorical(**given)


def log_one_hot(tokens):
    return jnp.log(jnp.maximum(jax.nn.one_hot(tokens, K), 1e-30))


def transition(alpha, k, is_masked):
    """q(to | from) `[from, to]` of every symbol, float64."""
    size = k + is_masked
    pi = np.eye(size)[k] if is_masked else np.full(size, 1 / k)
    return alpha * np.eye(size) + (1 - alpha) * pi


@pytest.mark.parametrize("schedule", oracles.SCHEDULES)
@pytest.mark.parametrize("noise", NOISES)
def test_posterior_is_bayes_rule_on_the_forward_process(noise, schedule):
    process = oracles.process_of(CHAIN, noise, schedule)
    alpha = oracles.SCHEDULES[schedule][1]
    size = process.num_symbols
    pairs = np.float32(
        [[0.7, 0.3], [1, 0.5], [1, 0], [0.2, 0], [0.501, 0.5], [1e-3, 5e-4], [1, 0.99]]
    )
    x, z, pair = (a.ravel() for a in np.indices((K, size, len(pairs))))
    t, s = pairs[pair].T
    log_q = jax.jit(process.posterior)(log_one_hot(x), z, t, s)
    found = np.exp(np.asarray(log_q, np.float64))
    checked = 0
    for i in range(len(x)):
        first, last = alpha(np.float64(s[i])), alpha(np.float64(t[i]))
        to_s = transition(first, K, process.is_masked)[x[i]]
        to_t = transition(last / first, K, process.is_masked)
        joint = to_s * to_t[:, z[i]]
        if joint.sum() < 1e-12:  # this z never comes from this x
            assert process.is_masked
            continue
        # Differences of two alphas, at least 1e-3 of them, to 6e-8 each.
        np.testing.assert_allclose(found[i], joint / joint.sum(), atol=1e-5)
        np.testing.assert_allclose(found[i].sum(), 1, atol=2e-6)
        np.testing.assert_allclose(
            joint.sum(), transition(last, K, process.is_masked)[x[i], z[i]], atol=1e-12
        )
        checked += 1
    assert checked >= len(pairs) * K * (2 if process.is_masked else K) * 0.6


def test_masked_posterior_reveals_x_or_keeps_what_is_seen():
    process = made()
    t, s = jnp.float32(0.8), jnp.float32(0.6)
    x = jnp.float32([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    found = jnp.exp(process.posterior(jnp.log(x), jnp.int32([K, 1]), t, s))
    # u = (alpha_s - alpha_t) / (1 - alpha_t) = 0.25; the x of a seen token is no matter
    expected = [[0.125, 0.075, 0.05, 0.75], [0, 1, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("noise", NOISES)
def test_last_step_returns_x_and_a_contradicted_token_stays(noise):
    process = made(noise=noise)
    keys = jax.random.key(0)
    x = jnp.tile(jnp.int32([[0, 1, 2]]), (200, 1))
    z = process.prior(jax.random.key(1), x.shape)
    found = process.step(keys, x, z, jnp.float32(0.4), jnp.float32(0.0))
    np.testing.assert_array_equal(found, x)
    if noise == "masked":
        z = jnp.full_like(x, 1)
        found = process.step(keys, x, z, jnp.float32(0.4), jnp.float32(0.2))
        np.testing.assert_array_equal(found, z)


def raw_output(process, joint, z, t):
    """What an exact network of this prediction answers, float64."""
    schedule, k = process.schedule, joint.num_tokens
    alpha = np.float64(schedule.alpha(t))[:, None, None]
    mask = process.mask if process.is_masked else None
    both = [
        np.stack(
            [
                joint.denoiser(zi, ai, mask, skip)
                for zi, ai in zip(z, alpha[:, 0, 0], strict=True)
            ]
        )
        for skip in (False, True)
    ]
    if process.prediction == "denoiser":
        return both[0], both[0]
    if process.prediction == "leave_one_out":
        return both[0], both[1]
    if process.is_masked:
        return both[0], 7.0 * both[0]  # the scale of scores is no matter

    # q(z with j at i) / q(z), by summing over all data
    def marginal(zi, ai):
        each = ai * (joint.sequences == zi) + (1 - ai) / k
        return (joint.probs * each.prod(1)).sum()

    scores = np.ones((*z.shape, k))
    for b, i, j in np.ndindex(*scores.shape):
        other = z[b].copy()
        other[i] = j
        a = alpha[b, 0, 0]
        scores[b, i, j] = marginal(other, a) / marginal(z[b], a)
    return both[0], scores


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", NOISES)
def test_every_output_is_read_as_the_one_denoiser(noise, prediction):
    process = made(noise=noise, prediction=prediction)
    z = CHAIN.sequences[::2]
    if process.is_masked:
        z = np.where(np.random.default_rng(0).random(z.shape) < 0.5, K, z)
    t = np.linspace(0.1, 0.95, len(z), dtype=np.float32)
    denoiser, raw = raw_output(process, CHAIN, z, t)
    with np.errstate(divide="ignore"):
        raw = np.maximum(np.log(raw), -69) + 0.7 * (prediction != "score")
    read = jax.jit(process.predict)(jnp.float32(raw), z, t)
    assert read.logits.dtype == jnp.float32
    # A score less the noise's share, over alpha >= 0.05: 1e-7 / 0.05 of 0.1.
    np.testing.assert_allclose(np.exp(read.logits), denoiser, atol=3e-5)
    alone = jax.jit(process.leave_one_out)(read, z, t)
    expected = [
        CHAIN.denoiser(zi, 1 - ti, None if noise == "uniform" else K, skip_own=True)
        for zi, ti in zip(z, np.float64(t), strict=True)
    ]
    at = np.asarray(z == K) if process.is_masked else np.ones_like(z, bool)
    np.testing.assert_allclose(np.exp(alone)[at], np.stack(expected)[at], atol=3e-5)
    # What the oracles of the other tests say.
    exact = oracles.oracle(CHAIN, process)(jnp.int32(z), jnp.asarray(t))
    np.testing.assert_allclose(np.exp(exact.logits), denoiser, atol=1e-5)


def test_plug_in_of_leave_one_out_is_the_mixture_over_the_denoiser():
    # The specification's 1e-12 is that of float64; here 1e-7 is one rounding.
    process = made(noise="uniform", schedule=alphas.NicholCosine())
    rng = np.random.default_rng(0)
    denoiser = rng.dirichlet(np.ones(K), 400)
    z = rng.integers(0, K, 400)
    t = rng.uniform(0.02, 1, 400).astype(np.float32)
    s = (t * rng.uniform(0, 0.98, 400)).astype(np.float32)

    @jax.jit
    def both(log_x):
        prediction = CategoricalPrediction(log_x)
        alone = process.leave_one_out(prediction, z, t)
        plugged = process.posterior(alone, z, t, s)
        each = [
            process.posterior(log_one_hot(jnp.full(400, k)), z, t, s) for k in range(K)
        ]
        mixed = sum(jnp.exp(log_x[:, k, None] + each[k]) for k in range(K))
        wrong = process.posterior(log_x, z, t, s)
        return jnp.exp(plugged), mixed, jnp.exp(wrong)

    plugged, mixed, wrong = both(jnp.float32(np.log(denoiser)))
    np.testing.assert_allclose(plugged, mixed, atol=3e-6)
    assert np.abs(wrong - mixed).max() > 0.3


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ends_of_time_have_finite_values_and_gradients(schedule, noise, prediction):
    process = oracles.process_of(CHAIN, noise, schedule, prediction)
    t = jnp.float32([0, 1e-7, 1 - 2.0**-24, 1, 1, 1e-3])
    s = jnp.float32([0, 0, 0.5, 1 - 2.0**-24, 0, 0])
    size = process.num_symbols
    z = jnp.arange(6 * 3).reshape(6, 3) % size
    raw = 3 * jax.random.normal(jax.random.key(0), (6, 3, K))

    def all_of(raw):
        prediction = process.predict(raw, z, t)
        alone = process.leave_one_out(prediction, z, t)
        # Not the first: no time has passed.
        moved = process.posterior(alone[1:], z[1:], t[1:], s[1:])
        marginal = process.log_marginal(alone, t)
        return jnp.exp(prediction.logits), alone, moved, marginal

    values, back = jax.jit(lambda raw: jax.vjp(all_of, raw))(raw)
    assert all(np.isfinite(a).all() for a in values)
    ones = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), values)
    assert np.isfinite(back(ones)[0]).all()
    np.testing.assert_allclose(values[0].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.exp(values[2]).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_corrupted_tokens_have_the_marginal(noise):
    process = made(noise=noise)
    count = 20_000
    x = jnp.full((3, count), 1)
    t = jnp.float32([0.0, 0.3, 1.0])
    z, changed = jax.jit(process.corrupt)(jax.random.key(0), x, t)
    assert z.dtype == jnp.int32
    np.testing.assert_array_equal(z[0], x[0])
    assert changed[2].all() and not changed[0].any()
    for row, alpha in ((1, 0.7), (2, 0.0)):
        expected = transition(alpha, K, process.is_masked)[1]
        found = np.bincount(z[row], minlength=len(expected)) / count
        spread = np.sqrt(expected * (1 - expected) / count)
        assert np.all(np.abs(found - expected) <= 4 * spread)


def test_steps_have_the_posterior():
    process = made(noise="uniform")
    count = 20_000
    x, z = jnp.full(count, 1), jnp.full(count, 2)
    t, s = jnp.float32(0.8), jnp.float32(0.3)
    found = jax.jit(process.step)(jax.random.key(0), x, z, t, s)
    # [a z + (1 - a) / K] [alpha_s x + (1 - alpha_s) / K] with a = 2 / 7, by hand
    weight = np.array([5 / 21 * 0.1, 5 / 21 * 0.8, 11 / 21 * 0.1])
    found = np.bincount(found, minlength=K)
    assert stats.chisquare(found, weight / weight.sum() * count).pvalue > 1e-3


def test_masked_steps_reveal_as_often_as_the_posterior_says():
    process, count = made(), 20_000
    x, z = jnp.zeros((count, 2), jnp.int32), jnp.full((count, 2), K)
    t, s = jnp.float32(0.8), jnp.where(jnp.arange(count) % 2, 0.6, 0.2)
    found = jax.jit(process.step)(jax.random.key(0), x, z, t, s)
    assert set(np.unique(found)) == {0, K}
    for start, u in ((0, 0.75), (1, 0.25)):
        revealed = int((found[start::2] == 0).sum())
        assert stats.binomtest(revealed, count, u).pvalue > 1e-3


def test_draws_are_those_without_a_bound_on_their_noise():
    # The usual ones in float32 never exceed 15.94.
    logits = jax.random.normal(jax.random.key(0), (500, 64))
    key = jax.random.key(1)
    found = categorical.draw(key, logits)
    high = jax.random.categorical(key, logits, mode="high")
    np.testing.assert_array_equal(found, high)
    assert np.any(found != jax.random.categorical(key, logits))
    rounded = logits.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        categorical.draw(key, rounded),
        categorical.draw(key, rounded.astype(jnp.float32)),
    )


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_an_example_is_that_of_its_key(noise):
    process = made(noise=noise)
    keys = jax.random.split(jax.random.key(0), 4)
    whole = process.prior_from(keys, (5,))
    assert whole.shape == (4, 5) and whole.dtype == jnp.int32
    np.testing.assert_array_equal(whole[2:3], process.prior_from(keys[2:3], (5,)))
    assert whole.max() <= process.num_symbols - 1
    assert np.all(whole == K) == (noise == "masked")


def test_pixels_become_levels_and_back():
    process = made(spec=DataSpec(shape=(2, 2, 1)), levels=256)
    bytes_ = np.arange(256)
    x = np.float32(bytes_ / 127.5 - 1).reshape(1, 16, 16, 1)
    tokens = process.encode(x)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens.ravel(), bytes_)
    np.testing.assert_allclose(process.decode(tokens), x, atol=1e-6)
    np.testing.assert_array_equal(process.encode(jnp.float32([-1.2, 1.2])), [0, 255])
    plain = made()
    np.testing.assert_array_equal(plain.decode(plain.encode([[0, 2]])), [[0, 2]])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise": "mask"}, "noise: unknown 'mask'; known: masked, uniform"),
        ({"prediction": "x"}, "prediction: unknown 'x'; known: denoiser, leave"),
        ({"schedule": Cosine()}, "schedule: Cosine is of gaussian noise"),
        ({"levels": 4}, "levels: the data are tokens, 3 of them"),
        ({"spec": DataSpec(shape=(2,))}, "levels: the data are no tokens"),
        ({"spec": DataSpec(shape=(2,)), "levels": 1}, "at least 2, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        made(**changes)
