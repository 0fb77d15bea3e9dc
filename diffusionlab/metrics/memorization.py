"""Whether samples repeat the data: in feature space, against what was trained on.

For samples f_j, reference examples r_i and the Frechet distance FD between them

    MiFID        = FD / m,  m = mean_j min_i (1 - |cos(f_j, r_i)|), or 1 from 0.1 on (1)
    authenticity = share of j with |f_j - r_i*| >= min_l |r_i* - r_l|, l != i*       (2)

where r_i* is the example nearest to f_j: (2) counts the samples that are no nearer to
an example than another example is.

Source: Bai et al. 2021 (arXiv 2106.03062), section 3, for (1); Alaa et al. 2022 (arXiv
2102.08921), section 4, for (2), AuthPct / 100 in dgm-eval. torchmetrics 1.9 averages
over the examples the minimum over samples in (1): another number.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from diffusionlab import pictures
from diffusionlab.metrics import base, frechet, kernel, neighbours
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult

_CHUNK = 2**22  # entries of a block of cosines: 32 MB
_SAME = 1e-8  # a Frechet distance up to here is that of equal sets


def cosine_distances(samples: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns min_i (1 - |cos(f_j, r_i)|) for each of `samples`, `[M]` in [0, 1]."""
    largest = np.zeros(len(samples))
    rows = max(1, int(_CHUNK**0.5))
    for i in range(0, len(samples), rows):
        left, found = kernel.unit(samples[i : i + rows]), largest[i : i + rows]
        for j in range(0, len(reference), rows):
            block = left @ kernel.unit(reference[j : j + rows]).T
            np.maximum(found, np.abs(block, out=block).max(axis=1), out=found)
    return np.maximum(1.0 - largest, 0.0)


def mifid(distance: float, cosines: np.ndarray, threshold: float = 0.1) -> float:
    """Returns equation 1 for a Frechet distance and `cosine_distances`.

    It is 0 where the Frechet distance is, and infinite where every sample is a multiple
    of an example and the Frechet distance is not 0.
    """
    if distance <= _SAME:
        return 0.0
    mean = float(np.mean(cosines))
    if mean >= threshold:
        return distance
    return distance / mean if mean > 0 else float("inf")


class Nearest(NamedTuple):
    """The nearest example of each sample.

    Attributes:
      index: `[M]` int, of the example.
      distance: `[M]`, to it.
      among: `[N]`, from each example to its nearest other example.
    """

    index: np.ndarray
    distance: np.ndarray
    among: np.ndarray


def nearest(samples: np.ndarray, reference: np.ndarray) -> Nearest:
    """Returns the nearest of `reference` `[N, d]` to each of `samples` `[M, d]`."""
    index, distance = neighbours.nearest(samples, reference)
    return Nearest(index, distance, neighbours.knn_radii(reference, 1))


def authentic(found: Nearest) -> np.ndarray:
    """Returns the condition of equation 2 for each sample, `[M]` bool.

    A copy is never authentic, even of an example that the reference has twice.
    """
    return (found.distance >= found.among[found.index]) & (found.distance > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization:
    """Distances of samples to their nearest examples; the reference is training data.

    Numbers:

      mifid: equation 1; `mifid_distance` is m before the threshold.
      authenticity: equation 2.
      nearest_distance: median euclidean distance to the nearest example;
        `nearest_distance_reference` the same from examples to other examples, and
        `nearest_distance_ratio` of the two; clearly below 1 means that examples repeat.
      too_close: share of samples nearer to an example than 99 % of the examples are to
        another; 0.01 is what fresh data would have.

    A picture shows samples beside their nearest examples, the closest first.

    Attributes:
      threshold: of equation 1.
      num_pairs: in the picture, at most.
    """

    threshold: float = 0.1
    num_pairs: int = 48
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_positive(threshold=self.threshold)
        if self.num_pairs < 0:
            raise ValueError(f"num_pairs: must not be negative, got {self.num_pairs}.")

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        x, y = base.both_rows(samples, reference, "features")
        neighbours.check_k(1, len(y), reference.name)
        a, b = base.both_moments(samples, reference, "features")
        cosines = cosine_distances(x, y)
        found = nearest(x, y)
        median, usual = float(np.median(found.distance)), float(np.median(found.among))
        shares = {
            "authenticity": authentic(found),
            "too_close": found.distance < np.quantile(found.among, 0.01),
        }
        mean, interval = base.of_mean(cosines)
        numbers = {
            "mifid": mifid(frechet.frechet_distance(a, b), cosines, self.threshold),
            "mifid_distance": mean,
            "nearest_distance": median,
            "nearest_distance_reference": usual,
            "nearest_distance_ratio": median / max(usual, 1e-12),
        }
        intervals = {"mifid_distance": interval}
        for name, values in shares.items():
            count = int(np.sum(values))
            numbers[name], intervals[name] = base.of_share(count, len(values))
        notes = {
            "mifid": frechet.about(a, b)
            + (
                f"; mean cosine distance at or above {self.threshold:g}: the Frechet "
                "distance as it is"
                if mean >= self.threshold
                else f"; mean cosine distance {mean:.4g}"
            ),
            "nearest_distance": f"euclidean, between {x.shape[1]} features",
        }
        few = frechet.warning(a, b)
        if few:
            notes["warning"] = few
        shown = _picture(samples, reference, found, self.num_pairs)
        return EvalResult(numbers, notes, shown, intervals=intervals)


def _picture(samples, reference, found, number) -> dict[str, np.ndarray]:
    """The closest pairs side by side, where both sets have images to show."""
    closest = np.argsort(found.distance, kind="stable")[:number]
    if not len(closest):
        return {}
    try:
        left = samples.examples(closest)
        right = reference.examples(found.index[closest])
    except ValueError:
        return {}
    if left.shape != right.shape or not pictures.shows_images(left.shape[1:]):
        return {}
    caption = f"sample | its nearest in {reference.name}, closest first"
    return {"nearest": pictures.pairs(left, right, 8, caption=caption)}
