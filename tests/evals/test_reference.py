"""Features of a source are computed once, and never used for other data."""

import dataclasses
import fcntl

import jax
import numpy as np
import pytest

from diffusionlab.evals import reference
from diffusionlab.features.base import Network, Room
from diffusionlab.types import DataSpec

CALLS = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """Vectors that count; those in CHANGED have another second entry."""

    split: str = "train"
    number: int = 30

    @property
    def spec(self):
        return DataSpec((2,), 3)

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        READ.append(index)
        x = np.float32([index, float(index in CHANGED)])
        return {"x": x, "label": np.int32(index % 3)}


CHANGED, READ = [], []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Versioned(Numbers):
    version: str = "a"


def network(weights="w"):
    both = lambda _, x: {"features": x, "logits": x}  # noqa: E731
    return Network({}, both, lambda x: x, {"weights": weights})


@pytest.fixture
def features(tmp_path):
    """`features(source, network, limit)` in its own cache; CALLS counts batches."""
    room = Room(tmp_path, None)

    def apply(function, params, x):
        CALLS.append(len(x))
        return jax.device_get(function(params, x))

    def run(source=None, chosen=None, limit=0, outputs=("features",)):
        CALLS.clear()
        return reference.of_source(
            source or Numbers(), chosen or network(), outputs, apply, room, limit
        )

    yield run
    CHANGED.clear()


def test_computed_once(features):
    first = features()
    assert sum(CALLS) == 30
    second = features()
    assert CALLS == []
    np.testing.assert_array_equal(first.rows("features"), second.rows("features"))
    np.testing.assert_array_equal(first.rows("features")[:, 0], np.arange(30))
    assert second.name == "train data of Numbers"
    np.testing.assert_array_equal(second.label, np.arange(30) % 3)


@pytest.mark.parametrize(
    ("other", "limit"),
    [
        (dict(source=Numbers(split="test")), 0),
        (dict(source=Numbers(number=29)), 0),
        (dict(chosen=network("v")), 0),
        ({}, 10),
    ],
)
def test_another_source_network_or_number_has_its_own(features, other, limit):
    features()
    features(**other, limit=limit)
    assert CALLS != []


def test_fewer_examples_are_evenly_spaced(features):
    stored = features(limit=10)
    np.testing.assert_array_equal(stored.rows("features")[:, 0], np.arange(10) * 3)
    np.testing.assert_array_equal(stored.examples([1, 4])[:, 0], [3, 12])


@pytest.mark.parametrize("number", [1, 10, 63, 64, 200])
def test_data_that_changed_are_never_answered_from_the_cache(features, number):
    """Every example counts, of a source that does not say when its files changed."""
    source = Numbers(number=number)
    features(source)
    for index in {0, number // 2, number - 1}:
        CHANGED[:] = [index]
        changed = features(source).rows("features")
        assert sum(CALLS) == number and changed[index, 1] == 1.0
    CHANGED.clear()
    assert features(source).rows("features")[:, 1].max() == 0.0
    assert CALLS == []


def test_a_source_with_a_version_is_asked_for_that(features):
    source = Versioned(number=1000)
    features(source)
    read = len(READ)
    features(source)
    # Some examples, and its version, are looked at before its features are used.
    assert CALLS == [] and len(READ) - read == 64
    features(Versioned(number=1000, version="b"))
    assert sum(CALLS) == 1000


def test_other_outputs_are_another_entry(features):
    features()
    features(outputs=("features", "logits"))
    assert sum(CALLS) == 30


def test_one_program_computes_at_a_time(features, monkeypatch):
    held, fill = [], reference.feature_store.fill

    def watched(folder, *args, **kwargs):
        lock = folder.with_suffix(".lock").open("a")
        with lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(folder)
        return fill(folder, *args, **kwargs)

    monkeypatch.setattr(reference.feature_store, "fill", watched)
    features()
    assert len(held) == 1
