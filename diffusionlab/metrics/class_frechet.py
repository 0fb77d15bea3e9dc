"""Frechet distance class by class: whether each class looks right, not only the whole.

A model that confuses two classes, or has one of them poor, can have a small distance
over all classes together; here each has its own, and the mean over classes counts all
alike.

Source: DeVries et al. 2019 (arXiv 1907.08175) on conditional distances; the mean over
classes is their within-class part.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab.metrics import base, frechet
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassFrechet:
    """Frechet distance of each class, and their mean.

    Numbers `class_frechet/<class>` and `class_frechet`, the mean. Every class of the
    reference is asked for. A class has few examples, so that the bias of a Frechet
    distance is large here: compare equal numbers only.

    Attributes:
      groups: of the jackknife behind the interval of the mean: each leaves out a part
        of every class, at the cost of all distances once more; 0 is without interval.
    """

    groups: int = 10
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        a, b = base.both_rows(samples, reference, "features")
        labels = [_labels(part) for part in (samples, reference)]
        numbers, without, fewest = {}, [], len(a)
        groups = self.groups
        for c in np.union1d(*labels):
            name = _name(reference, int(c))
            # In ascending order, which a memory map is read in.
            mine, theirs = (np.flatnonzero(label == c) for label in labels)
            for features, index in ((samples, mine), (reference, theirs)):
                if len(index) < 2:
                    raise ValueError(
                        f"{features.name}: class '{name}' has {len(index)} examples, "
                        "and a covariance needs at least 2; take more samples, or "
                        "compare sets of the same classes."
                    )
            mine, theirs = a[mine], b[theirs]
            fewest = min(fewest, len(mine), len(theirs))
            numbers[f"class_frechet/{name}"] = frechet.distance_of_rows(mine, theirs)
            if len(mine) < max(groups, 4):
                groups = 0
            parts = base.groups_of(len(mine), groups)
            without.append(
                [
                    frechet.distance_of_rows(np.delete(mine, part, axis=0), theirs)
                    for part in parts
                ]
            )
        value = float(np.mean(list(numbers.values())))
        intervals = {}
        if groups:
            intervals["class_frechet"] = base.jackknife(value, np.mean(without, axis=0))
        notes = {
            "class_frechet": f"mean of {len(numbers)} classes, {len(a)} samples "
            f"against {len(b)} examples, {a.shape[1]} features"
        }
        if fewest <= a.shape[1]:
            notes["warning"] = (
                f"a class has {fewest} examples of {a.shape[1]} features: its distance "
                "is far too large even where the distributions agree; compare equal "
                "numbers of samples only."
            )
        return EvalResult(
            {"class_frechet": value, **numbers}, notes, intervals=intervals
        )


def _labels(features: Features) -> np.ndarray:
    if features.label is None:
        raise ValueError(
            f"{features.name}: 'class_frechet' needs a label of every example, and "
            "there are none; leave the metric out."
        )
    return np.asarray(features.label)


def _name(reference: Features, c: int) -> str:
    names = reference.class_names
    return names[c] if 0 <= c < len(names) else str(c)
