"""Features of a source are computed once, and never used for other data."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusionlab.evals import reference
from diffusionlab.features.base import Network, Room
from diffusionlab.types import DataSpec

CALLS = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """Vectors that count; a shift changes the data behind the same name."""

    split: str = "train"
    number: int = 30

    @property
    def spec(self):
        return DataSpec((2,), 3)

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return {"x": np.float32([index, SHIFT[0]]), "label": np.int32(index % 3)}


SHIFT = [0.0]


def network(weights="w"):
    return Network({}, lambda _, x: {"features": x}, lambda x: x, {"weights": weights})


@pytest.fixture
def features(tmp_path):
    """`features(source, network, limit)` in its own cache; CALLS counts batches."""
    room = Room(tmp_path, None)

    def apply(function, params, x):
        CALLS.append(len(x))
        return jax.device_get(function(params, x))

    def run(source=None, chosen=None, limit=0):
        CALLS.clear()
        SHIFT[0] = SHIFT[0] if source is None else 0.0
        return reference.of_source(
            source or Numbers(), chosen or network(), ["features"], apply, room, limit
        )

    yield run
    SHIFT[0] = 0.0


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


def test_data_that_changed_are_refused(features):
    features()
    SHIFT[0] = 1.0
    with pytest.raises(ValueError, match="the train data of Numbers are other ones"):
        features()
    assert CALLS == []


def test_interrupted_while_the_data_changed_is_refused_too(features, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference.feature_store, "fill", stop)
        features()
    SHIFT[0] = 1.0
    with pytest.raises(ValueError, match="other ones"):
        features()
