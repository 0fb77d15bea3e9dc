"""A set of features made of arrays, and the sets whose statistics are known."""

import dataclasses

import numpy as np

from diffusionlab.metrics import moments


@dataclasses.dataclass
class Arrays:
    """What `metrics.base.Features` asks for, from arrays by the name of the output."""

    name: str = "samples"
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None
    label: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    images: np.ndarray | None = None
    only_moments: bool = False

    @property
    def num(self):
        return len(next(a for a in self._arrays() if a is not None))

    def _arrays(self):
        return self.features, self.logits, self.spatial

    def rows(self, output):
        if self.only_moments:
            raise ValueError(f"{self.name}: only moments are known.")
        return getattr(self, output)

    def moments(self, output):
        return moments.of_rows(getattr(self, output))

    def examples(self, indices):
        if self.images is None:
            raise ValueError(f"{self.name}: there are no examples.")
        return self.images[np.asarray(indices)]


def reference(features=None, **others):
    return Arrays("the reference", features, **others)


def golden():
    """A `[300, 32]`, B `[250, 32]` and logits `[1003, 20]` of the golden values.

    The values were computed with another program from this recipe.
    """
    g = np.random.default_rng(0)
    a = g.normal(size=(300, 32))
    noise = g.normal(size=(250, 32))
    b = noise @ (np.eye(32) + 0.1 * g.normal(size=(32, 32))) + 0.2
    return a, b, 3 * g.normal(size=(1003, 20))


def covered(measure, truth, repeats):
    """Returns the share of `repeats` intervals `measure(rng)` that hold `truth`."""
    found = [measure(np.random.default_rng(seed)) for seed in range(repeats)]
    return np.mean([low <= truth <= high for low, high in found])
