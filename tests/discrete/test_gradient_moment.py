"""The Gradient Moment where its expectation is known: a unigram reference model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.metrics import gradient_moment, text

UNIFORM, TILTED = np.full(4, 0.25), np.array([0.4, 0.3, 0.2, 0.1])
EXACT = 0.05  # sum of (TILTED - UNIFORM)²


def unigram(logits, tokens):
    return jax.nn.log_softmax(logits)[tokens]


def bigram(logits, tokens):
    """Of each token given the one before, which is token 0 at the start."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return jax.nn.log_softmax(logits)[before, tokens]


gradient = gradient_moment.make_gradient(unigram)
bigram_gradient = gradient_moment.make_gradient(bigram)
REFERENCE = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4]))


def whole(tokens):
    tokens = np.asarray(tokens, np.int32)
    return gradient(REFERENCE, tokens, np.ones(tokens.shape, bool), 2)


def drawn(law, num, rows=2, length=4, seed=0):
    generator = np.random.default_rng(seed)
    return generator.choice(4, size=(num, rows, length), p=law)


def test_the_expectation_over_all_small_batches_is_exact():
    """Batches of one row of two tokens, all 16, weighted by their probability."""
    batches = list(itertools.product(range(4), repeat=2))
    found = np.stack([whole([batch]) for batch in batches]).astype(np.float64)
    means = []
    for law in (TILTED, UNIFORM):
        weights = np.array([law[a] * law[b] for a, b in batches])
        means.append(weights @ found)
        # The gradient of the mean of -log p: the model's law minus the tokens' own.
        np.testing.assert_allclose(means[-1], np.exp(REFERENCE) - law, atol=1e-6)
    # Independent batches: the expectation of a product is that of the means.
    assert np.sum((means[0] - means[1]) ** 2) == pytest.approx(EXACT, abs=1e-6)


def estimates(law, num=400, seed=0):
    """Returns single pairs `[num]` of two batches of each side, and all of them."""
    sides = [
        np.stack([whole(b) for b in drawn(law_, 2 * num, seed=seed + i)])
        for i, law_ in enumerate((law, UNIFORM))
    ]
    difference = (sides[0] - sides[1]).astype(np.float64)
    single = np.sum(difference[:num] * difference[num:], axis=1)
    return single, sides


def test_the_estimator_finds_the_moment_of_a_tilted_law():
    single, sides = estimates(TILTED)
    error = single.std(ddof=1) / np.sqrt(len(single))
    assert abs(single.mean() - EXACT) < 3 * error < 0.05
    found = gradient_moment.gradient_moment(*sides)
    moment = found["gradient_moment"]
    assert abs(moment.value - EXACT) < 3 * moment.error
    # All pairs of the same batches say more than disjoint ones, and the error says so.
    assert moment.error < error
    law = np.exp(REFERENCE)
    for name, side in (("gradient_norm", TILTED), ("gradient_norm_real", UNIFORM)):
        exact = np.sum((law - side) ** 2)
        assert abs(found[name].value - exact) < 3 * found[name].error < 0.05


def test_the_moment_of_data_against_data_is_zero():
    single, sides = estimates(UNIFORM, seed=10)
    error = single.std(ddof=1) / np.sqrt(len(single))
    assert abs(single.mean()) < 3 * error
    assert (single > 0).any() and (single < 0).any()
    found = gradient_moment.gradient_moment(*sides)
    for name in ("gradient_moment", "gradient_moment_real"):
        assert abs(found[name].value) < 3 * found[name].error < 0.02


def test_one_row_again_and_again_is_found_though_its_perplexity_is_its_own():
    """A tiled row: no entropy across samples, which no perplexity shows."""
    generator = np.random.default_rng(3)
    length, model = 16, np.full((4, 4), 0.1) + 0.6 * np.eye(4)
    logits, every = jnp.log(jnp.asarray(model)), np.ones((4, length), bool)
    rows = np.zeros((64, length), np.int64)
    before = np.zeros(64, np.int64)
    for i in range(length):
        before = np.array([generator.choice(4, p=model[b]) for b in before])
        rows[:, i] = before
    data = rows.reshape(16, 4, length).astype(np.int32)
    # Of all rows the one whose perplexity is nearest to that of the data.
    nll = -np.asarray(bigram(logits, rows)).mean(1)
    row = rows[np.argmin(np.abs(nll - nll.mean()))]
    tiled = np.broadcast_to(row, data.shape).astype(np.int32)
    sides = [
        np.stack([bigram_gradient(logits, b, every, 4) for b in batches])
        for batches in (tiled, data)
    ]
    found = gradient_moment.gradient_moment(*sides)
    moment, real = found["gradient_moment"], found["gradient_moment_real"]
    assert moment.value > 5 * moment.error and moment.value > 0.01
    assert abs(real.value) < 3 * real.error
    log_p = np.asarray(bigram(logits, tiled[0]))
    own = np.exp(-np.asarray(bigram(logits, row[None])).mean())
    assert text.generative_perplexity(log_p, every) == pytest.approx(own, rel=1e-6)
    # Rows' means differ by log(7) / 16 from each other: one is within half of that.
    assert own == pytest.approx(np.exp(nll.mean()), rel=0.07)


def test_the_mean_is_over_tokens_however_a_batch_is_divided():
    tokens = np.array([[0, 1, 2], [3, 3, 1], [2, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
    shares = np.bincount(tokens[mask], minlength=4) / mask.sum()
    for rows in (1, 2, 3, 5):
        found = gradient(REFERENCE, tokens, mask, rows)
        np.testing.assert_allclose(found, np.exp(REFERENCE) - shares, atol=1e-6)
    with pytest.raises(ValueError, match="mask: no token"):
        gradient(REFERENCE, tokens, mask & False, 2)


def test_pairs_and_their_error_by_hand():
    rows = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]], np.float32)
    found = gradient_moment.mean_of_pairs(gradient_moment.gram(rows))
    products = np.array([2.0, 0.0, 3.0])  # of rows 01, 02, 12
    assert found.value == pytest.approx(products.mean())
    # Without a row only the other two's product is left.
    assert found.error == pytest.approx(
        np.sqrt(2 / 3 * np.sum((products - 5 / 3) ** 2))
    )
    assert np.isnan(gradient_moment.mean_of_pairs(np.eye(2)).error)
    apart = gradient_moment.gram(rows[:1], rows[1:])
    np.testing.assert_array_equal(apart, gradient_moment.gram(rows))
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        gradient_moment.mean_of_pairs(np.ones((1, 1)))
    with pytest.raises(ValueError, match="data: gradients"):
        gradient_moment.gradient_moment(rows, rows[:2])
