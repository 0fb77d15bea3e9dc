"""The n-gram models that a bound on text is compared with."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from diffusionlab.data.text import Text


@pytest.fixture(scope="module", name="text_bound")
def text_bound_module(root):
    path = root / "benchmarks" / "text_bound.py"
    spec = importlib.util.spec_from_file_location("text_bound", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_models_by_hand(text_bound):
    # 'abaac' with a, b, c = 0, 1, 2: counts 3, 1, 1 and 3 kinds of 5 tokens.
    train = np.array([0, 1, 0, 0, 2], np.uint8)
    grams = np.array([[0, 0], [0, 1], [1, 0], [1, 2], [2, 0]])
    one, two = text_bound.probabilities(train, grams, 3)
    a, b = (3 + 3 / 3) / (5 + 3), (1 + 3 / 3) / (5 + 3)
    np.testing.assert_allclose(one, [a, b, a, b, a])
    # 'a' is followed by a, b and c once each, 'b' by a, and 'c' by nothing.
    expected = [(1 + 3 * a) / 6, (1 + 3 * b) / 6, (1 + a) / 2, b / 2, a]
    np.testing.assert_allclose(two, expected)


def test_probabilities_sum_to_one_after_every_history(text_bound):
    rng = np.random.default_rng(0)
    k, order = 5, 4
    train = rng.choice(k, 300, p=[0.5, 0.3, 0.15, 0.05, 0.0]).astype(np.uint8)
    histories = np.stack(np.unravel_index(np.arange(k ** (order - 1)), [k] * 3), 1)
    grams = np.concatenate(
        [np.repeat(histories, k, 0), np.tile(np.arange(k), len(histories))[:, None]], 1
    )
    for p in text_bound.probabilities(train, grams, k):
        assert np.all(p > 0)
        np.testing.assert_allclose(p.reshape(-1, k).sum(1), 1, rtol=1e-12)


def test_a_token_is_scored_after_those_before_it(text_bound):
    # A cycle: what follows is known but for the share of shorter histories.
    stream = np.arange(3000) % 3
    found = text_bound.bits(stream[:2000], stream[2000:], 3, max_order=3)
    assert found[0] == pytest.approx(np.log2(3), abs=1e-3)
    assert found[1] == pytest.approx(0, abs=2e-3) and found[2] < found[1]
    # Of the first held-out token the history is the end of the training split.
    shifted = text_bound.bits(stream[:2001], stream[2000:2001], 3, max_order=2)
    assert shifted[1] > 5


def test_python_s_help_has_the_bits_of_the_specification(text_bound):
    train, test = (Text(corpus="pydoc", split=split) for split in ("train", "test"))
    found = text_bound.bits(train.tokens, test.tokens, train.spec.num_tokens)
    # Other Pythons have other pages.
    far = 0.005 if sys.version_info[:3] == (3, 11, 7) else 0.05
    expected = [4.67, 3.34, 2.47, 2.03, 1.90, 1.93]
    np.testing.assert_allclose(found, expected, atol=far)


def test_the_newest_bound_of_a_run_is_beside_them(text_bound, tmp_path):
    (tmp_path / "evals").mkdir()
    for step, number in ((20, 2.5), (100, 1.25)):
        record = {
            "step": step,
            "settings": {"name": "elbo"},
            "numbers": {"bits_per_token": number},
        }
        name = f"step_{step:08d}_bound.json"
        (tmp_path / "evals" / name).write_text(json.dumps(record))
    other = {"step": 200, "settings": {"name": "samples"}, "numbers": {}}
    (tmp_path / "evals" / "step_00000200_samples.json").write_text(json.dumps(other))
    (tmp_path / "text.txt").write_text("abcab" * 40)
    block = {"name": "text", "path": str(tmp_path / "text.txt"), "length": 4}
    assert text_bound.bound(tmp_path) == (1.25, 100)
    said = text_bound.table(block, tmp_path, 3)
    assert "180 training and 20 held-out tokens out of 3; bits per character" in said
    assert (
        "at most 1.250, at step 100" in said and "above the best of the n-grams" in said
    )


def test_what_has_no_table_is_refused_before_anything_is_counted(text_bound, tmp_path):
    with pytest.raises(ValueError, match="--max_order: must be at least 1, got 0"):
        text_bound.table(text_bound.PYDOC, None, 0)
    with pytest.raises(ValueError, match="--run: its data are 'digits', and no text"):
        text_bound.table({"name": "digits"}, tmp_path, 3)


def test_too_many_tokens_are_refused(text_bound):
    with pytest.raises(ValueError, match="grams of 6 out of 50257 tokens are too many"):
        text_bound.Counts(np.zeros(9, np.int32), 6, 50_257)
