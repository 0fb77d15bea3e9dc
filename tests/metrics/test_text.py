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
