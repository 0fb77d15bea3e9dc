"""Sources whose examples are drawn: a gaussian mixture, and smooth images.

Example i is a function of (seed, split, i).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab import types
from diffusionlab.data import base

_NUM_WAVES = 3


def _names(num_classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(num_classes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of isotropic gaussians, p(x) = sum_k weights_k N(x; means_k, std^2 I).

    In two dimensions the means lie evenly on a circle, otherwise in random directions.
    The label is the component, or there is none: then the components are what a model
    has to find. The closed form is in `means`, `weights` and `std`.

    Attributes:
      split: 'train' or 'test'; independent draws.
      dimension: of x, which is `[dimension]`.
      num_components: also the number of classes.
      labelled: False leaves the labels out.
      std: of every component, in every direction.
      radius: norm of the means.
      seed: of the examples, and of the means where these are random.
      size: examples of a split.
    """

    split: str = "train"
    dimension: int = 2
    num_components: int = 8
    labelled: bool = True
    std: float = 0.1
    radius: float = 1.0
    seed: int = 0
    size: int = 10_000

    def __post_init__(self):
        base.check_split(self.split)
        for name in ("dimension", "num_components", "size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: must be at least 1, got {getattr(self, name)}."
                )
        if self.std <= 0:
            raise ValueError(f"std: must be above 0, got {self.std}.")
        object.__setattr__(self, "_means", self._place_means())
        labels = base.generator(self.seed, f"mixture/{self.split}/label")
        eps = base.generator(self.seed, f"mixture/{self.split}/eps")
        label = labels.integers(self.num_components, size=self.size, dtype=np.int32)
        x = self._means[label]
        x = x + self.std * eps.standard_normal((self.size, self.dimension))
        object.__setattr__(self, "_x", x.astype(np.float32))
        object.__setattr__(self, "_label", label)

    def _place_means(self) -> np.ndarray:
        if self.dimension == 2:
            angle = np.arange(self.num_components) * (2 * np.pi / self.num_components)
            directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        else:
            rng = base.generator(self.seed, "mixture/means")
            directions = rng.standard_normal((self.num_components, self.dimension))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return self.radius * directions

    @property
    def means(self) -> np.ndarray:
        """The exact means, float64 `[num_components, dimension]`."""
        return self._means.copy()

    @property
    def weights(self) -> np.ndarray:
        """The exact probabilities of the components, float64 `[num_components]`."""
        return np.full(self.num_components, 1 / self.num_components)

    @property
    def spec(self) -> types.DataSpec:
        classes = self.num_components if self.labelled else 0
        return types.DataSpec((self.dimension,), classes, _names(classes))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> base.Example:
        return self.__getitems__(index)

    def __getitems__(self, indices) -> base.Example:
        batch = {"x": self._x[indices]}
        return {**batch, "label": self._label[indices]} if self.labelled else batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Smooth random arrays of any shape that depend on the class: a stand-in for data.

    x = tanh(a sum of low cosine waves along every axis but the last), with coefficients
    pattern[label] + 0.3 eps. The label of example i is i mod num_classes.

    Attributes:
      shape: of x; the last axis is channels.
      split: 'train' or 'test'; the patterns of the classes are the same.
      num_classes: 0 gives no labels, and one pattern.
      size: examples of a split.
      seed: of patterns and examples.
    """

    shape: tuple
    split: str = "train"
    num_classes: int = 10
    size: int = 1024
    seed: int = 0

    def __post_init__(self):
        base.check_split(self.split)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape: expected positive sizes, got {self.shape}.")
        if self.num_classes < 0 or self.size < 1:
            raise ValueError(
                "num_classes, size: must be at least 0 and 1, got "
                f"{self.num_classes} and {self.size}."
            )
        waves = (_NUM_WAVES,) * (len(self.shape) - 1) + self.shape[-1:]
        patterns = base.generator(self.seed, "generated/patterns")
        eps = base.generator(self.seed, f"generated/{self.split}")
        pattern = patterns.standard_normal((max(self.num_classes, 1), *waves))
        coefficients = 0.3 * eps.standard_normal((self.size, *waves), np.float32)
        coefficients += pattern[np.arange(self.size) % len(pattern)]
        object.__setattr__(self, "_coefficients", coefficients)

    @property
    def spec(self) -> types.DataSpec:
        return types.DataSpec(self.shape, self.num_classes, _names(self.num_classes))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> base.Example:
        batch = self.__getitems__(np.asarray([index]))
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices) -> base.Example:
        indices = np.asarray(indices)
        x = self._coefficients[indices]
        for axis, length in enumerate(self.shape[:-1], start=1):
            position = (np.arange(length) + 0.5) / length
            waves = np.cos(np.pi * position[:, None] * np.arange(_NUM_WAVES))
            x = np.tensordot(x, waves.astype(np.float32), axes=(axis, 1))
            x = np.moveaxis(x, -1, axis)
        batch = {"x": np.ascontiguousarray(np.tanh(x))}
        if self.num_classes:
            batch["label"] = (indices % self.num_classes).astype(np.int32)
        return batch
