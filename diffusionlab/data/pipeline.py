"""The order in which examples are read: the batch at step k depends on (seed, k) only.

Position p of the run reads example order(p // N)[p mod N], where N is the number of
examples and order(e) is the permutation of epoch e, a function of (seed, e). The batch
at step k is positions k B ... (k + 1) B - 1, and each process reads some rows of it:
those that its devices need, see `rows_of`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from diffusionlab import types
from diffusionlab.data import base

# Grain wants a length; no run gets there.
_NUM_STEPS = 2**62


def rows_of(sharding, batch_size: int) -> tuple[int, int]:
    """Returns (start, stop), the rows of a batch that this process's devices need.

    Args:
      sharding: of the batch; processes whose devices need the same rows all read them.
      batch_size: over all processes.

    Raises:
      ValueError: they are not contiguous.
    """
    needed = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = sorted({rows.indices(batch_size)[:2] for (rows,) in needed})
    start, stop = bounds[0]
    for first, last in bounds[1:]:
        if first > stop:
            raise ValueError(
                f"config.mesh: this process would read rows {bounds} of a batch, which "
                "are not contiguous; order the mesh so that 'data' and 'fsdp' span "
                "whole processes."
            )
        stop = max(stop, last)
    return start, stop


class Batches:
    """An endless iterator over the batches of one process, prefetched by threads.

    Yields dictionaries of numpy arrays `[stop - start, ...]`. A source
    with fewer examples than a batch is read over several epochs in one batch.
    """

    def __init__(
        self,
        source: types.Source,
        *,
        batch_size: int,
        seed: int,
        augments: Sequence[Any] = (),
        rows: tuple[int, int] | None = None,
        num_threads: int = 2,
        prefetch: int = 4,
    ):
        """Starts at step 0; see `seek` and `set_state`.

        Args:
          source: what is read; read by several threads at once.
          batch_size: over all processes.
          seed: of the order and of the augmentation; at least 0.
          augments: applied to 'x', in this order; see `data/augment.py`.
          rows: (start, stop) of every batch that are wanted; all by default.
          num_threads: batches that are prepared at the same time.
          prefetch: batches that may wait.

        Raises:
          ValueError: the source is empty, or a number is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}.")
        start, stop = rows or (0, batch_size)
        if not 0 <= start < stop <= batch_size:
            raise ValueError(f"rows: {rows} are not rows of a batch of {batch_size}.")
        if seed < 0:
            raise ValueError(f"seed: must be at least 0, got {seed}.")
        if len(source) == 0:
            raise ValueError(f"source: {source} has no examples.")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._augments = tuple(augments)
        self._slice = slice(start, stop)
        # Two epochs meet in a batch, or in the batches that are prefetched.
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        steps = grain.MapDataset.range(_NUM_STEPS).map(self.batch_at)
        self._iterator = iter(
            steps.to_iter_dataset(
                grain.ReadOptions(
                    num_threads=num_threads, prefetch_buffer_size=prefetch
                )
            )
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = base.generator(self._seed, "order", epoch)
        return rng.permutation(len(self._source))

    def indices_at(self, step: int) -> np.ndarray:
        """Returns which examples this process reads at `step`, int64."""
        first = step * self._batch_size + self._slice.start
        last = step * self._batch_size + self._slice.stop
        size = len(self._source)
        parts = []
        for epoch in range(first // size, (last - 1) // size + 1):
            start = epoch * size
            parts.append(self._order(epoch)[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def batch_at(self, step: int) -> base.Example:
        """Returns the batch at `step`; does not move the iterator."""
        batch = base.gather(self._source, self.indices_at(step))
        for number, augment in enumerate(self._augments):
            rng = base.generator(self._seed, f"augment/{number}", step)
            drawn = augment.draw(rng, self._batch_size)[self._slice]
            batch["x"] = augment(batch["x"], drawn)
        return batch

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> base.Example:
        return next(self._iterator)

    def seek(self, step: int) -> None:
        """Makes the batch at `step` the next one."""
        if step < 0:
            raise ValueError(f"step: must be at least 0, got {step}.")
        self._iterator.set_state({"next_index": step})

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "num_examples": len(self._source),
        }

    def get_state(self) -> dict[str, int]:
        """Returns where the iterator stands: 'step' of the next batch, and checks."""
        step = int(self._iterator.get_state()["next_index"])
        return {"step": step} | self._identity()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where `get_state` was called; the number of processes may differ.

        Raises:
          ValueError: the order of examples would not be that of the saved run.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"{name}: the saved data state has {state.get(name)}, this run "
                    f"has {value}; the order of examples would change."
                )
        self.seek(state["step"])

    def close(self) -> None:
        """Stops the threads; there is no next batch after this."""
        self._iterator.close()
