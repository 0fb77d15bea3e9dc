"""Features on disk: whatever the batches and the interruptions, the same rows."""

import json

import jax
import numpy as np
import pytest

from diffusionlab.evals import feature_store
from diffusionlab.features.base import Network
from diffusionlab.types import DataSpec

X = np.random.default_rng(0).normal(size=(23, 3, 2)).astype(np.float32)
LABEL = np.arange(23, dtype=np.int32) % 4
NUM = len(X)


def twice(params, x):
    flat = x.reshape(len(x), -1)
    return {"features": flat * params["scale"], "logits": flat[:, :2]}


def network(scale=2.0):
    about = {"network": "twice", "weights": scale}
    return Network({"scale": np.float32(scale)}, twice, lambda x: x, about)


def apply(function, params, x):
    return jax.device_get(function(params, x))


def batches(size, stop=NUM, label=True, asked=None):
    def run(start):
        if asked is not None:
            asked.append(start)
        for first in range(start, stop, size):
            last = min(first + size, stop)
            yield X[first:last], LABEL[first:last] if label else None

    return run


def fill(folder, chosen, num=NUM, outputs=("features", "logits"), identity="a"):
    feature_store.fill(
        folder,
        chosen,
        num,
        network(),
        outputs,
        apply,
        name="samples",
        identity=identity,
        timeout=10.0,
    )
    return feature_store.Stored(folder, "samples", tuple("abcd"))


@pytest.mark.parametrize("size", [1, 7, 23, 50])
def test_rows_do_not_depend_on_the_batches(tmp_path, size):
    stored = fill(tmp_path / "store", batches(size))
    np.testing.assert_array_equal(stored.rows("features"), 2 * X.reshape(23, -1))
    np.testing.assert_array_equal(stored.rows("logits"), X.reshape(23, -1)[:, :2])
    np.testing.assert_array_equal(stored.label, LABEL)
    assert stored.num == 23 and stored.class_names == tuple("abcd")
    assert stored.digest == feature_store.chain("", X, LABEL)


def test_moments_are_those_of_the_rows(tmp_path):
    found = fill(tmp_path / "store", batches(7)).moments("features")
    rows = 2 * X.reshape(23, -1).astype(np.float64)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-12)


def test_what_was_interrupted_goes_on_from_the_last_whole_batch(tmp_path):
    folder, asked = tmp_path / "store", []

    def broken(start):
        for number, batch in enumerate(batches(5)(start)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        fill(folder, broken)
    # A batch that was half written when the machine went down.
    with (folder / "features.bin").open("ab") as file:
        file.write(b"half a batch")
    stored = fill(folder, batches(5, asked=asked))
    assert asked == [15]
    np.testing.assert_array_equal(stored.rows("features"), 2 * X.reshape(23, -1))
    np.testing.assert_array_equal(stored.label, LABEL)
    assert stored.digest == feature_store.chain("", X, LABEL)


def test_what_is_whole_is_not_computed_again(tmp_path):
    fill(tmp_path / "store", batches(5))
    asked = []
    fill(tmp_path / "store", batches(5, asked=asked))
    assert asked == []


def test_a_store_of_something_else_is_begun_anew(tmp_path):
    fill(tmp_path / "store", batches(5, stop=20), num=20)
    asked = []
    fill(tmp_path / "store", batches(5, asked=asked), identity="b")
    assert asked == [0]


def test_damaged_progress_begins_anew(tmp_path):
    fill(tmp_path / "store", batches(5))
    (tmp_path / "store" / "progress.json").write_text('{"num": 2')
    asked = []
    stored = fill(tmp_path / "store", batches(5, asked=asked))
    assert asked == [0] and stored.num == 23
    assert json.loads((tmp_path / "store" / "progress.json").read_text())["num"] == 23


def test_without_labels_there_are_none(tmp_path):
    assert fill(tmp_path / "store", batches(5, label=False)).label is None


def test_only_the_outputs_asked_for_are_kept(tmp_path):
    fill(tmp_path / "store", batches(5), outputs=("logits",))
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {"logits.bin", "label.bin", "progress.json"}


def test_an_example_that_is_not_finite_is_named(tmp_path):
    def bad(start):
        x = X[:5].copy()
        x[2, 0, 0], x[4, 1, 1] = np.nan, np.inf
        yield x, LABEL[:5]

    with pytest.raises(ValueError, match="samples: example 2 is not finite, nor are 1"):
        fill(tmp_path / "store", bad)


def test_too_few_examples_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="samples: expected 23 examples, and got 20"):
        fill(tmp_path / "store", batches(5, stop=20))


def test_digest_depends_on_values_order_and_labels():
    digests = {
        feature_store.chain("", X, LABEL),
        feature_store.chain("", X[::-1], LABEL),
        feature_store.chain("", X + 1e-3, LABEL),
        feature_store.chain("", X, LABEL[::-1]),
        feature_store.chain("", X[:-1], LABEL[:-1]),
    }
    assert len(digests) == 5
    part = feature_store.chain("", X[:9], LABEL[:9])
    assert feature_store.chain(part, X[9:], LABEL[9:]) == feature_store.chain(
        "", X, LABEL
    )


def test_classes_without_names_have_numbers():
    assert feature_store.class_names(DataSpec((2,), 3)) == ("0", "1", "2")
    assert feature_store.class_names(DataSpec((2,), 2, ("a", "b"))) == ("a", "b")


@pytest.mark.parametrize("name", ["features", "label"])
def test_files_that_lost_rows_are_made_anew(tmp_path, name):
    folder = tmp_path / "store"
    fill(folder, batches(5))
    file = folder / f"{name}.bin"
    file.write_bytes(file.read_bytes()[:-4])
    asked = []
    stored = fill(folder, batches(5, asked=asked))
    assert asked == [0]
    np.testing.assert_array_equal(stored.rows("features"), 2 * X.reshape(23, -1))
