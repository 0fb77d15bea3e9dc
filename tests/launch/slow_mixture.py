"""Data that come slowly: jobs that live long, and leave the processor to others."""

import time

from diffusionlab.data import generated


class _Slow(generated.Mixture):
    def __getitems__(self, indices):
        time.sleep(0.02)
        return super().__getitems__(indices)


def slow(
    *,
    split: str = "train",
    dimension: int = 2,
    num_components: int = 8,
    std: float = 0.1,
) -> generated.Mixture:
    return _Slow(
        split=split, dimension=dimension, num_components=num_components, std=std
    )
