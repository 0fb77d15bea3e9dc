"""The batch at step k depends on (seed, k) only."""

import itertools
import json
import time

import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.data import augment, generated, pipeline, sources


class Numbers:
    """Example i is the number i."""

    def __init__(self, num):
        self._num = num
        self.spec = types.DataSpec((1,))

    def __len__(self):
        return self._num

    def __getitem__(self, index):
        return {"x": np.asarray([index], np.float32)}


def images():
    return generated.Generated(shape=(8, 8, 3), size=37)


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def numbers(batches, num_steps):
    return [next(batches)["x"][:, 0].astype(int) for _ in range(num_steps)]


@pytest.mark.parametrize("bounds", [(0, 4, 8), (0, 2, 4, 6, 8), (0, 5, 8)])
def test_the_batch_does_not_depend_on_who_reads_which_rows(bounds):
    changes = (augment.Flip(), augment.Translate(max_shift=2))
    options = {"batch_size": 8, "seed": 3, "augments": changes}
    whole = pipeline.Batches(images(), **options)
    for step in (0, 4, 1000):
        parts = [
            pipeline.Batches(images(), **options, rows=rows).batch_at(step)
            for rows in itertools.pairwise(bounds)
        ]
        joined = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        equal(joined, whole.batch_at(step))


class Sharding:
    """Of a process with a device for each of the given rows."""

    def __init__(self, *rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*rows),) for i, rows in enumerate(self._rows)}


@pytest.mark.parametrize(
    "needed, expected",
    [
        ([(4, 6), (6, 8)], (4, 8)),
        ([(6, 8), (4, 6), (4, 6)], (4, 8)),
        ([(None, None), (None, None)], (0, 8)),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(needed, expected):
    assert pipeline.rows_of(Sharding(*needed), 8) == expected


def test_rows_with_a_gap_are_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        pipeline.rows_of(Sharding((0, 2), (4, 6)), 8)


@pytest.mark.parametrize("size, batch_size", [(12, 4), (10, 4), (3, 8)])
def test_every_example_comes_once_per_epoch_in_a_new_order(size, batch_size):
    batches = pipeline.Batches(Numbers(size), batch_size=batch_size, seed=0)
    num_epochs = 2 * batch_size
    seen = np.concatenate(numbers(batches, num_epochs * size // batch_size))
    epochs = seen.reshape(num_epochs, size)
    assert np.all(np.sort(epochs) == np.arange(size))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    batches.close()


def test_another_seed_is_another_order():
    first, second = (
        pipeline.Batches(Numbers(64), batch_size=64, seed=seed).indices_at(0)
        for seed in (0, 1)
    )
    assert np.any(first != second)


@pytest.mark.parametrize("num_threads, prefetch", [(1, 1), (4, 8)])
def test_the_iterator_gives_the_batches_in_order(num_threads, prefetch):
    batches = pipeline.Batches(
        images(), batch_size=8, seed=1, num_threads=num_threads, prefetch=prefetch
    )
    for step in range(20):
        equal(next(batches), batches.batch_at(step))
    batches.close()


def test_a_restored_iterator_goes_on_where_the_saved_one_was():
    first = pipeline.Batches(Numbers(10), batch_size=4, seed=1)
    numbers(first, 5)
    state = json.loads(json.dumps(first.get_state()))
    second = pipeline.Batches(Numbers(10), batch_size=4, seed=1, rows=(2, 4))
    second.set_state(state)
    for a, b in zip(numbers(first, 6), numbers(second, 6), strict=True):
        np.testing.assert_array_equal(a[2:], b)
    assert first.get_state() == second.get_state() == state | {"step": 11}
    second.seek(7)
    equal(next(second), second.batch_at(7))
    first.close(), second.close()


def test_a_state_of_another_order_is_refused():
    state = pipeline.Batches(Numbers(10), batch_size=4, seed=1).get_state()
    with pytest.raises(ValueError, match="num_examples: the saved .* 10, .* has 11"):
        pipeline.Batches(Numbers(11), batch_size=4, seed=1).set_state(state)


@pytest.mark.parametrize(
    "size, options, message",
    [
        (9, {"batch_size": 0}, "batch_size: .* got 0"),
        (9, {"batch_size": 4, "rows": (2, 6)}, r"rows: \(2, 6\) .* batch of 4"),
        (9, {"batch_size": 4, "rows": (2, 2)}, "rows"),
        (9, {"batch_size": 4, "seed": -1}, "seed"),
        (0, {"batch_size": 4}, "no examples"),
    ],
)
def test_wrong_numbers_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Batches(Numbers(size), **{"seed": 0, **options})


def test_an_error_of_the_source_reaches_the_caller():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise ValueError(f"cannot read example {index}")

    batches = pipeline.Batches(Broken(4), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="cannot read example"):
        next(batches)
    batches.close()


def test_a_batch_of_digits_takes_less_than_a_millisecond():
    batches = pipeline.Batches(sources.Digits(), batch_size=128, seed=0)
    batches.batch_at(0)
    times = []
    for step in range(50):
        start = time.perf_counter()
        batches.batch_at(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
