"""Samples of text: numbers by hand, and a reference that knows their law."""

import json
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.evals.text_quality import TextQuality
from diffusionlab.features.base import Room
from diffusionlab.types import DataSpec

K, LENGTH = 4, 16
MODEL = np.full((K, K), 0.1) + 0.6 * np.eye(K)


class Text:
    def __init__(self, rows, letters="abcd"):
        self.x = np.asarray(rows, np.int32)
        self.letters = letters
        self.spec = DataSpec(self.x.shape[1:], num_tokens=len(letters))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index]}

    def decode(self, tokens):
        return "".join(self.letters[i] for i in tokens)

    def encode(self, text):
        return np.array([self.letters.index(c) for c in text], np.int32)


def bigram(logits, tokens):
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return jax.nn.log_softmax(logits)[before, tokens]


def drawn(num, seed):
    """Rows of the law of the reference, `[num, LENGTH]`."""
    generator = np.random.default_rng(seed)
    rows, before = np.zeros((num, LENGTH), np.int32), np.zeros(num, int)
    for i in range(LENGTH):
        u = generator.random(num)
        before = (np.cumsum(MODEL[before], 1) < u[:, None]).sum(1)
        rows[:, i] = before
    return rows


def context(samples, train, test, room=None):
    return python_types.SimpleNamespace(
        draw=lambda num: (samples[:num], np.zeros(num, np.int32)),
        train=train,
        test=test,
        room=room,
        spec=train.spec,
    )


@pytest.fixture
def reference(tmp_path):
    """`reference(source)` is (its run directory, a room that opens it)."""

    def make(source):
        folder = tmp_path / "run"
        folder.mkdir()
        block = {"objective": {"name": "language_model"}}
        (folder / "config.json").write_text(json.dumps(block))
        logits = np.log(MODEL).astype(np.float32)
        if source.letters != "abcd":
            order = ["abcd".index(c) for c in source.letters]
            logits = logits[np.ix_(order, order)]

        def open_language_model(path, step):
            assert path == folder and step in (None, 7)
            return logits, bigram, source, {"step": step or 9}

        return str(folder), Room(tmp_path, None, 1.0, open_language_model)

    return make


def test_numbers_by_hand():
    train = Text([[0, 1, 2, 3, 0, 0], [3, 3, 3, 3, 3, 3]])
    test = Text([[3, 3, 3, 3, 2, 1], [0, 0, 0, 0, 0, 0]])
    samples = np.array([[0, 1, 2, 0, 0, 0], [2, 3, 0, 1, 2, 3]])
    run = TextQuality(num_samples=2, distinct=(2,), ngrams=(2, 3))
    run.check(train)
    numbers = run(context(samples, train, test)).numbers
    first = -(4 / 6 * np.log(4 / 6) + 2 / 6 * np.log(1 / 6))
    second = -(4 / 6 * np.log(2 / 6) + 2 / 6 * np.log(1 / 6))
    assert numbers["entropy"] == pytest.approx((first + second) / 2)
    # 01 12 20 00 00, 23 30 01 12 23
    assert numbers["distinct/2"] == 6 / 10
    # All but 20; then 012, and 230, 012, 123 without 301.
    assert numbers["overlap/2"] == 9 / 10
    assert numbers["overlap/3"] == 4 / 8
    assert numbers["longest_copy"] == (3 + 4) / 2
    assert numbers["longest_copy_max"] == 4
    assert numbers["longest_copy_real"] == (4 + 2) / 2
    # Of 3333 and 00 all, 32 21 not: 3 + 5 of 10.
    assert numbers["overlap_real/2"] == 8 / 10
    assert "perplexity" not in numbers


def run_of(reference, samples, source=None, **options):
    test = Text(drawn(512, 1))
    path, room = reference(source or test)
    run = TextQuality(
        num_samples=512, num_train=8, reference=path, batch_size=64, **options
    )
    run.check(test)
    return run(context(samples, Text(drawn(8, 2)), test, room))


def test_samples_of_the_references_own_law_have_its_entropy_and_no_moment(reference):
    result = run_of(reference, drawn(512, 3), num_batches=16, reference_step=7)
    numbers, intervals = result.numbers, result.intervals
    entropy = -np.sum(MODEL[0] * np.log(MODEL[0]))
    for name in ("perplexity", "perplexity_real"):
        low, high = intervals[name]
        width = high - low
        assert width < 0.2
        assert abs(numbers[name] - np.exp(entropy)) < 0.75 * width
    for name in ("gradient_moment", "gradient_moment_real"):
        low, high = intervals[name]
        assert abs(numbers[name]) < 0.75 * (high - low) < 0.005
    assert result.provenance["step"] == 7
    assert "tokens as they are, context 16;" in result.notes["perplexity"]


def test_one_row_repeated_has_a_moment_though_its_perplexity_looks_right(reference):
    rows = drawn(512, 3)
    nll = -np.asarray(bigram(np.log(MODEL), rows)).mean(1)
    row = rows[np.argmin(np.abs(nll - nll.mean()))]
    result = run_of(reference, np.tile(row, (512, 1)), num_batches=8)
    low, _ = result.intervals["gradient_moment"]
    assert low > 0.01 > result.intervals["gradient_moment_real"][1]
    own = np.exp(-np.asarray(bigram(np.log(MODEL), row[None])).mean())
    assert result.numbers["perplexity"] == pytest.approx(own, rel=1e-5)
    assert result.numbers["distinct/3"] < 0.05 < result.numbers["distinct_real/2"] * 50


def test_a_reference_of_other_tokens_is_asked_through_text(reference):
    samples = drawn(512, 3)
    same = -np.asarray(bigram(np.log(MODEL), samples)).mean()
    theirs = Text(np.zeros((1, LENGTH)), letters="acbd")
    result = run_of(reference, samples, theirs, num_batches=0)
    # Letter a is first in both, and the start of a row.
    assert result.numbers["perplexity"] == pytest.approx(np.exp(same), rel=1e-5)
    assert "gradient_moment" not in result.numbers
    assert "decoded and encoded" in result.notes["perplexity"]


def test_a_reference_of_shorter_text_is_refused(reference):
    with pytest.raises(ValueError, match="reference: its context is 8 tokens"):
        run_of(reference, drawn(512, 3), Text(np.zeros((1, 8))))


def test_too_few_held_out_examples_for_the_batches(reference):
    train = Text(drawn(8, 2))
    path, room = reference(train)
    run = TextQuality(num_samples=16, reference=path)
    with pytest.raises(ValueError, match="num_batches: 8 of them need as many held-"):
        run(context(drawn(16, 0), train, Text(drawn(4, 1)), room))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_samples": 0}, "num_samples: must be at least 1"),
        ({"ngrams": (0,)}, "ngrams: lengths are at least 1"),
        (
            {"num_batches": 1, "reference": "run"},
            "num_batches: must be from 2 to num_samples",
        ),
        (
            {"num_samples": 4, "reference": "run"},
            "num_batches: must be from 2 to num_samples",
        ),
        ({"reference_step": 3}, "reference_step: there is no reference"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        TextQuality(**fields)


def test_data_and_reference_are_checked_before_anything_runs(tmp_path):
    source = Text(drawn(4, 0))
    TextQuality().check(source)
    with pytest.raises(ValueError, match="ngrams: examples have 16 tokens, .* 17"):
        TextQuality(ngrams=(17,)).check(source)
    numbers = python_types.SimpleNamespace(spec=DataSpec((8, 8, 1)))
    with pytest.raises(
        ValueError, match=r"name: .* takes text, .* numbers \(8, 8, 1\)"
    ):
        TextQuality().check(numbers)
    with pytest.raises(FileNotFoundError, match="reference: there is no .*give a run"):
        TextQuality(reference=str(tmp_path / "no.safetensors")).check(source)
    (tmp_path / "config.json").write_text('{"objective": {"name": "discrete"}}')
    with pytest.raises(ValueError, match="reference: the run in .* no language model"):
        TextQuality(reference=str(tmp_path)).check(source)
