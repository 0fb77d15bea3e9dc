import numpy as np
import pytest

from diffusionlab.metrics import text
from diffusionlab.metrics.likelihood import bits_per_dim


@pytest.mark.parametrize(
    "tokens, exact",
    [([5] * 8, 0.0), (range(8), np.log(8)), ([0, 0, 1, 1], np.log(2))],
)
def test_entropies_by_hand(tokens, exact):
    found = text.unigram_entropy(np.array(list(tokens)))
    assert found == pytest.approx(exact, abs=1e-15)
    assert not np.signbit(found)


def test_entropy_is_per_sample():
    tokens = np.array([[[0, 0, 1, 1], [3, 3, 3, 3]]])
    assert text.unigram_entropy(tokens) == pytest.approx(np.array([[np.log(2), 0]]))


@pytest.mark.parametrize("tokens", [np.zeros(4), np.zeros((2, 0), int)])
def test_tokens_are_integers(tokens):
    with pytest.raises(ValueError, match="tokens: expected integers"):
        text.unigram_entropy(tokens)


def test_perplexities_by_hand():
    every = np.ones((2, 5), bool)
    uniform = np.full((2, 5), -np.log(50))
    assert text.generative_perplexity(uniform, every) == pytest.approx(50)
    assert text.generative_perplexity(np.zeros((2, 5)), every) == 1
    # NLL (1, 1) and (3): 5 over 3 tokens, not the mean of two samples.
    log_p = -np.array([[1.0, 1.0], [3.0, 99.0]])
    mask = np.array([[True, True], [True, False]])
    assert text.generative_perplexity(log_p, mask) == pytest.approx(np.exp(5 / 3))


def test_tokens_that_are_not_scored_may_be_anything():
    log_p = np.array([[np.nan, -1.0]])
    mask = np.array([[False, True]])
    assert text.generative_perplexity(log_p, mask) == pytest.approx(np.e)
    with pytest.raises(ValueError, match="log_p: 1 scored tokens are NaN"):
        text.generative_perplexity(log_p, ~mask)
    with pytest.raises(ValueError, match="mask: no token is scored"):
        text.generative_perplexity(log_p, mask & False)
    with pytest.raises(ValueError, match="mask: has shape"):
        text.generative_perplexity(log_p, mask[0])


def test_bits_per_dimension_by_hand():
    assert bits_per_dim(12 * np.log(256), 12) == pytest.approx(8)
    assert bits_per_dim(12 * np.log(2), 12, levels=256) == pytest.approx(8)
    many = bits_per_dim(np.array([3.0, 6.0]) * np.log(2), 3)
    assert many == pytest.approx([1, 2])
    with pytest.raises(ValueError, match="dims: must be at least 1"):
        bits_per_dim(1.0, 0)
    with pytest.raises(ValueError, match="levels: must be at least 2"):
        bits_per_dim(1.0, 1, levels=1)


def test_an_error_of_the_mean_over_samples():
    log_p = -np.array([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0], [2.0, 2.0]])
    mean, error = text.mean_and_error(log_p, np.ones((4, 2), bool))
    assert mean == pytest.approx(2)
    assert error == pytest.approx(np.std([1, 3, 2, 2], ddof=1) / 2)
    assert np.isnan(text.mean_and_error(log_p[:1], np.ones((1, 2), bool))[1])


def test_distinct_by_hand():
    tokens = np.array([[0, 1, 0, 1], [0, 1, 2, 2]])
    assert text.distinct(tokens, 1) == 3 / 8
    # 01 10 01, 01 12 22
    assert text.distinct(tokens, 2) == 4 / 6
    assert text.distinct(tokens, 4) == 1
    with pytest.raises(ValueError, match="n: must be in 1 ... 4, got 5"):
        text.distinct(tokens, 5)


def slow_runs(tokens, train):
    found = np.zeros(tokens.shape, int)
    for b, row in enumerate(tokens):
        for i in range(len(row)):
            for other in train:
                for j in range(len(other)):
                    n = 0
                    while max(i + n - len(row), j + n - len(other)) < 0:
                        if row[i + n] != other[j + n]:
                            break
                        n += 1
                    found[b, i] = max(found[b, i], n)
    return found


@pytest.mark.parametrize("length, other", [(5, 9), (8, 3), (1, 1), (6, 6)])
def test_copied_runs_are_those_of_every_pair_of_positions(length, other):
    generator = np.random.default_rng(length)
    tokens = generator.integers(0, 3, (4, length))
    train = generator.integers(0, 3, (5, other))
    train[0, : min(length, other)] = tokens[0, : min(length, other)]
    found = text.copied_runs(tokens, train)
    np.testing.assert_array_equal(found, slow_runs(tokens, train))


def test_copied_runs_end_where_a_row_does():
    tokens = np.array([[1, 2, 3, 4]])
    found = text.copied_runs(tokens, np.array([[0, 1, 2], [3, 4, 5]]))
    np.testing.assert_array_equal(found, [[2, 1, 2, 1]])
    with pytest.raises(ValueError, match="train: expected integers"):
        text.copied_runs(tokens, np.zeros((2, 2)))
