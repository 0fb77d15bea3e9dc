"""GPT-2 against transformers, and its tokenizer file, on weights of tests/features."""

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "features"))
import seeded

from diffusionlab.features import gpt2, language_model
from diffusionlab.features.base import Room

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

TEXTS = ["the theme\n", "here, there", "é"]


def write_tokenizer(folder):
    """Writes a byte-level tokenizer with a few merges; returns how many tokens."""
    found = tokenizers.ByteLevelBPETokenizer()
    found.train_from_iterator(TEXTS * 3, vocab_size=270, min_frequency=2)
    found.save(str(folder / "tokenizer.json"))
    return found.get_vocab_size()


def test_log_probabilities_and_gradients_are_those_of_transformers(tmp_path):
    vocabulary = write_tokenizer(tmp_path)
    arrays = seeded.gpt2(vocabulary)
    safetensors_numpy.save_file(
        arrays, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=12,
        n_embd=seeded.WIDTH,
        n_layer=seeded.DEPTH,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).double().eval()
    model = language_model.load(str(tmp_path), Room(tmp_path, None))
    assert model.context == 12 and model.first == 1
    rows = model.encode(TEXTS)
    assert max(map(len, rows)) < len(TEXTS[0])  # something is merged
    assert [len(r) for r in model.encode([""])] == [0]
    tokens = np.array([(row * 12)[:12] for row in rows], np.int32)

    def mean(params):
        return -model.log_probs(params, tokens)[:, 1:].mean()

    loss, slope = jax.jit(jax.value_and_grad(mean))(model.params)
    wanted = theirs(
        torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()
    )
    wanted.loss.backward()
    assert float(loss) == pytest.approx(wanted.loss.item(), rel=1e-5)
    exact = {
        name.removeprefix("transformer."): p.grad.numpy()
        for name, p in theirs.named_parameters()
    }
    exact = gpt2.convert(exact, "path")
    assert set(exact) == set(slope)
    for name, found in slope.items():
        size = np.abs(exact[name]).max()
        np.testing.assert_allclose(found, exact[name], atol=1e-4 * size, err_msg=name)
