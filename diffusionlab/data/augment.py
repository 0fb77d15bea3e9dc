"""Random changes of a batch of images, `[B, H, W, C]`.

A change is two functions. `draw(rng, num)` makes all randomness of a global batch, an
array `[num, ...]`; calling the change applies a slice of it to the images of one
process. So what happens to an example does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirrors images left to right.

    Attributes:
      probability: that an image is mirrored.
    """

    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability: must be in [0, 1], got {self.probability}.")

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Returns which images are mirrored, bool `[num]`."""
        return rng.random(num) < self.probability

    def __call__(self, x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Returns x with the drawn images mirrored."""
        return np.where(drawn[:, None, None, None], x[:, :, ::-1], x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate:
    """Shifts images by whole pixels, and fills what comes into view.

    Attributes:
      max_shift: pixels; both directions draw from -max_shift ... max_shift.
      fill: value of pixels from outside the image.
    """

    max_shift: int
    fill: float = -1.0

    def __post_init__(self):
        if self.max_shift < 0:
            raise ValueError(f"max_shift: must be at least 0, got {self.max_shift}.")

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Returns the shifts down and to the right, int `[num, 2]`."""
        return rng.integers(-self.max_shift, self.max_shift + 1, (num, 2))

    def __call__(self, x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Returns x with every image shifted by its drawn shift."""
        margin = (self.max_shift, self.max_shift)
        padded = np.pad(
            x, ((0, 0), margin, margin, (0, 0)), constant_values=np.float32(self.fill)
        )
        start = self.max_shift - drawn
        rows = start[:, :1] + np.arange(x.shape[1])
        columns = start[:, 1:] + np.arange(x.shape[2])
        example = np.arange(len(x))[:, None, None]
        return padded[example, rows[:, :, None], columns[:, None, :]]
