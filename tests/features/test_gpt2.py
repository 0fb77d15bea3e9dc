"""GPT-2 against a forward pass written out in NumPy, and what is refused."""

import json

import jax
import numpy as np
import pytest
import seeded
from safetensors import numpy as safetensors_numpy

from diffusionlab.features import gpt2, language_model
from diffusionlab.features.base import Room
from diffusionlab.types import DataSpec

TOKENS = np.random.default_rng(0).integers(0, 23, (3, 12)).astype(np.int32)


def norm(h, arrays, name):
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def slow_log_probs(arrays, tokens, heads):
    """Returns log p `[L - 1]` of all but the first of tokens `[L]`, in float64."""
    arrays = {k: v.astype(np.float64) for k, v in arrays.items()}
    h = arrays["wte.weight"][tokens] + arrays["wpe.weight"][: len(tokens)]
    size = h.shape[1] // heads
    for layer in ("h.0.", "h.1."):

        def linear(x, name, layer=layer):
            name = layer + name
            return x @ arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

        q, k, v = np.split(linear(norm(h, arrays, f"{layer}ln_1"), "attn.c_attn"), 3, 1)
        out = np.zeros_like(h)
        for head in range(heads):
            some = slice(head * size, (head + 1) * size)
            for i in range(len(tokens)):
                scores = q[i, some] @ k[: i + 1, some].T / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[i, some] = weights @ v[: i + 1, some] / weights.sum()
        h = h + linear(out, "attn.c_proj")
        x = linear(norm(h, arrays, f"{layer}ln_2"), "mlp.c_fc")
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        h = h + linear(0.5 * x * (1 + np.tanh(inner)), "mlp.c_proj")
    logits = norm(h, arrays, "ln_f") @ arrays["wte.weight"].T
    top = logits.max(-1, keepdims=True)
    logits = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logits[np.arange(len(tokens) - 1), tokens[1:]]


def write(folder, arrays, **config):
    safetensors_numpy.save_file(arrays, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("heads", [2, 4])
def test_log_probabilities_are_those_of_a_plain_forward_pass(heads, tmp_path):
    arrays = seeded.gpt2()
    # As some files have them, with what is no weight.
    extra = {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32)}
    stored = {f"transformer.{k}": v for k, v in (arrays | extra).items()}
    config = {"n_head": 4, "model_type": "gpt2"} if heads == 4 else {}
    params, log_probs, about = gpt2.load(str(write(tmp_path, stored, **config)), "path")
    assert about["heads"] == heads and len(about["weights"]) == 64
    found = np.asarray(jax.jit(log_probs)(params, TOKENS))
    assert found.shape == TOKENS.shape and not found[:, 0].any()
    exact = [slow_log_probs(arrays, row, heads) for row in TOKENS]
    np.testing.assert_allclose(found[:, 1:], exact, atol=2e-5)


def test_chunks_of_positions_change_nothing(monkeypatch):
    params = {"wte.weight": seeded.gpt2()["wte.weight"]}
    h = seeded.normal(3, 11, seeded.WIDTH)

    def value_and_slope():
        def mean(params, h):
            return gpt2._scores(params, h, TOKENS[:, 1:]).mean()

        return jax.value_and_grad(mean, (0, 1))(params, h)

    whole = value_and_slope()
    monkeypatch.setattr(gpt2, "_CHUNK", 4)  # 11 positions: the last chunk is filled
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        whole,
        value_and_slope(),
    )


def test_weights_of_something_else_are_refused(tmp_path):
    arrays = seeded.gpt2()
    with pytest.raises(ValueError, match="path: not a file of GPT-2: 'wpe.weight' is"):
        gpt2.convert({k: v for k, v in arrays.items() if k != "wpe.weight"}, "path")
    with pytest.raises(ValueError, match=r"'h.1.ln_2.bias' is missing"):
        gpt2.convert({k: v for k, v in arrays.items() if k != "h.1.ln_2.bias"}, "path")
    turned = arrays | {"h.0.attn.c_attn.weight": arrays["h.0.attn.c_attn.weight"].T}
    with pytest.raises(ValueError, match=r"shape \(384, 128\), and not \(128, 384\)"):
        gpt2.convert(turned, "path")
    write(tmp_path, arrays, n_head=3)
    with pytest.raises(ValueError, match="path: the width 128 .* no multiple"):
        gpt2.load(str(tmp_path), "path")
    params = gpt2.convert(arrays, "path")
    with pytest.raises(ValueError, match="13 of them, and this GPT-2 has 12"):
        gpt2.log_probs(params, np.zeros((1, 13), np.int32), heads=2)


@pytest.mark.parametrize(
    "other",
    [{"activation_function": "gelu"}, {"scale_attn_by_inverse_layer_idx": True}],
)
def test_another_architecture_of_the_same_names_is_refused(other, tmp_path):
    write(tmp_path, seeded.gpt2(), n_head=2, **other)
    with pytest.raises(ValueError, match=f"path: config.json .* has {list(other)[0]}"):
        gpt2.load(str(tmp_path), "path")


def test_a_tokenizer_file_neither_cuts_nor_fills_nor_is_of_another_model(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {"the": 0, "cat": 1, "<|endoftext|>": 2, "far": 23}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="the"))
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, seeded.gpt2(), n_head=2)
    model = language_model.load(str(tmp_path), Room(tmp_path, None))
    assert model.encode(["the cat the", "cat"]) == [[0, 1, 0], [1]]
    assert model.end == 2
    with pytest.raises(ValueError, match="token 23, and the weights have 23"):
        model.encode(["the far"])


def test_what_names_no_reference_is_refused(tmp_path):
    check = language_model.check
    with pytest.raises(FileNotFoundError, match="there is no .* give a run"):
        check(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(FileNotFoundError, match="holds neither a run nor"):
        check(str(tmp_path))
    write(tmp_path, seeded.gpt2(), model_type="gpt2")
    with pytest.raises(FileNotFoundError, match="reference: there is no .*tokenizer"):
        check(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    check(str(tmp_path))
    check(str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="reference_step: .* is no run"):
        language_model.load(str(tmp_path), Room(tmp_path, None), 3)
    (tmp_path / "config.json").write_text('{"objective": {"name": "denoising"}}')
    with pytest.raises(ValueError, match="objective 'denoising', which is no language"):
        check(str(tmp_path))


class Letters:
    """A source of tokens that are letters."""

    def __init__(self, letters, length=4):
        self.letters = letters
        self.spec = DataSpec((length,), num_tokens=len(letters))

    def decode(self, tokens):
        return "".join(self.letters[i] for i in tokens)

    def encode(self, text):
        return np.array([self.letters.index(c) for c in text], np.int32)


def model(source=None, encode=None, first=0, context=4):
    return language_model.LanguageModel({}, None, first, context, 0, encode, source, {})


X = np.array([[0, 1, 2, 0], [2, 2, 1, 1]], np.int32)


def test_tokens_of_one_vocabulary_stay_as_they_are():
    tokens, mask, cut = language_model.tokens_of(
        model(Letters("abc")), Letters("abc"), X
    )
    np.testing.assert_array_equal(tokens, X)
    assert mask.all() and not cut
    with pytest.raises(
        ValueError, match="context is 3 tokens, and the examples have 4"
    ):
        language_model.tokens_of(model(Letters("abc"), context=3), Letters("abc"), X)


def test_tokens_of_another_vocabulary_go_through_text():
    theirs = Letters("cab")
    encode = lambda texts: [theirs.encode(t) for t in texts]  # noqa: E731
    ours = Letters("abc")
    tokens, mask, _ = language_model.tokens_of(model(theirs, encode), ours, X)
    assert [theirs.decode(row) for row in tokens] == ["abca", "ccbb"] and mask.all()

    def halves(texts):  # a tokenizer whose rows differ in length
        return [[ord(c) for c in text.replace("cc", "z")] for text in texts]

    tokens, mask, cut = language_model.tokens_of(model(None, halves, 1, 3), ours, X)
    assert [[chr(i) for i in row] for row in tokens] == [list("abc"), list("zbb")]
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 1, 1]])
    assert cut == 1
    tokens, mask, cut = language_model.tokens_of(model(None, halves, 1, 9), ours, X)
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 1, 1, 0]])
    assert cut == 0


def test_of_the_ends_of_a_text_the_first_is_scored():
    encode = lambda texts: [[ord(c) for c in text] for text in texts]  # noqa: E731
    found = model(None, encode, 1)._replace(end=ord("b"))
    x = np.array([[0, 1, 2, 1], [1, 1, 0, 1], [0, 2, 0, 0]], np.int32)
    _, mask, _ = language_model.tokens_of(found, Letters("abc"), x)
    # The first token of a row follows nothing, and is not scored whatever it is.
    np.testing.assert_array_equal(mask, [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]])


def test_a_vocabulary_that_no_text_leads_to_is_refused():
    with pytest.raises(
        ValueError, match="reference: has 2 tokens of its own, and .* 3"
    ):
        language_model.tokens_of(model(Letters("ab")), Letters("abc"), X)
    theirs = Letters("ab")
    encode = lambda texts: [theirs.encode(t) for t in texts]  # noqa: E731
    with pytest.raises(ValueError, match="its tokenizer cannot encode the samples"):
        language_model.tokens_of(model(theirs, encode), Letters("abc"), X)
    with pytest.raises(ValueError, match="none of 2 examples has a token to score"):
        silent = model(None, lambda texts: [[1] for _ in texts], 1)
        language_model.tokens_of(silent, Letters("abc"), X)
    short = model(None, lambda texts: [[1, 2], []], 1)
    _, mask, _ = language_model.tokens_of(short, Letters("abc"), X)
    np.testing.assert_array_equal(mask, [[0, 1], [0, 0]])
