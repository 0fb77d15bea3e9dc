"""The batch at step k depends on (seed, k) only."""

import json
import time

import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.data import augment, base, generated, pipeline, sources


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


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_batch_does_not_depend_on_the_number_of_processes(process_count):
    changes = (augment.Flip(), augment.Translate(max_shift=2))
    options = {"batch_size": 8, "seed": 3, "augments": changes}
    whole = pipeline.Batches(images(), **options)
    for step in (0, 4, 1000):
        parts = [
            pipeline.Batches(
                images(), **options, process_index=i, process_count=process_count
            ).batch_at(step)
            for i in range(process_count)
        ]
        joined = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        equal(joined, whole.batch_at(step))


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
    second = pipeline.Batches(
        Numbers(10), batch_size=4, seed=1, process_index=1, process_count=2
    )
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
        (9, {"batch_size": 6, "process_count": 4}, "batch_size: 6 .* 4 processes"),
        (9, {"batch_size": 0}, "batch_size: 0"),
        (9, {"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index"),
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


def test_sequential_gives_every_example_in_order_and_a_partial_batch():
    parts = [batch["x"][:, 0].tolist() for batch in base.sequential(Numbers(7), 3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6]]


def test_take_spreads_over_the_source_and_ends_at_its_size():
    assert base.take(Numbers(10), 5)["x"][:, 0].tolist() == [0, 2, 4, 6, 8]
    assert len(base.take(Numbers(3), 5)["x"]) == 3


def test_a_batch_of_digits_takes_less_than_a_millisecond():
    batches = pipeline.Batches(sources.Digits(), batch_size=128, seed=0)
    batches.batch_at(0)
    times = []
    for step in range(50):
        start = time.perf_counter()
        batches.batch_at(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
