"""Samples of small images: recognised, spread like the data, and not copied."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab import pictures, types
from diffusionlab.evals import arrays
from diffusionlab.metrics.neighbours import flat, nearest, precision_recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Compares samples with training and held-out data, in pixel space.

    A name that ends in `_real` is the same figure for real training examples in place
    of the samples: what a perfect sampler would reach. Numbers:

      agreement: share of the samples that a classifier fitted on the training data
        recognises as the class they were asked to be; `accuracy/<class>` by class.
        `agreement_real` is the classifier's accuracy on held-out data.
      precision, recall: see `metrics/neighbours.py`, against held-out data.
      nearest_train: median distance of samples to their nearest training example;
        `nearest_train_real` that of held-out data, `nearest_train_ratio` their ratio;
        clearly below 1 means that training examples are being repeated.
      too_close: share of samples nearer to a training example than 99 % of the
        held-out data are; 0.01 is what fresh data would have.

    Attributes:
      num_samples: samples drawn.
      k: neighbour that sets the radius of a ball of precision and recall.
      num_real: training and held-out examples used, at most, of each; evenly spaced.
        The classifier's time grows with its square.
      num_columns: samples of each class in the picture.
      num_classes: classes in the picture, at most.
      every: steps between evaluations; 0 is at the end only.
    """

    num_samples: int = 1000
    k: int = 5
    num_real: int = 5000
    num_columns: int = 12
    num_classes: int = 20
    every: int = 0

    processes = ("gaussian", "categorical")
    compares_splits = True  # training with held-out data: one set is not enough

    def __post_init__(self):
        if self.num_samples <= self.k or self.num_real <= self.k or self.k < 1:
            raise ValueError(
                "num_samples, num_real: must be more than k, and k at least 1, got "
                f"{self.num_samples}, {self.num_real}, {self.k}."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        x, label = (np.asarray(part) for part in context.draw(self.num_samples))
        train = arrays.spread(context.train, self.num_real)
        test = arrays.spread(context.test, self.num_real)
        notes = {
            "data": f"{len(x)} samples, {len(train['x'])} training and "
            f"{len(test['x'])} held-out examples, pixel space"
        }
        numbers = {}
        if context.spec.num_classes:
            numbers |= agreement(x, label, train, test, context.spec)
            notes["agreement"] = (
                "support vector classifier, fitted on the training examples; "
                "agreement_real is its accuracy on held-out examples"
            )
        numbers |= self._coverage(x, train["x"], test["x"])
        notes["precision"] = f"k = {self.k}; _real: training against held-out examples"
        closest, memorised = _memorisation(x, train["x"], test["x"])
        numbers |= memorised
        notes["nearest_train"] = "euclidean; _real: held-out to training examples"
        shown = {}
        if len(context.spec.shape) == 3:
            shown = self._pictures(x, label, train["x"][closest], test, context.spec)
        return types.EvalResult(numbers, notes, shown)

    def _coverage(self, x, train, test) -> dict[str, float]:
        # A k-NN ball shrinks as a set grows, so both sets have the same size.
        number = min(len(x), len(train))
        some = train[np.arange(number) * len(train) // number]
        precision, recall = precision_recall(test, x[:number], self.k)
        precision_real, recall_real = precision_recall(test, some, self.k)
        return {
            "precision": precision,
            "precision_real": precision_real,
            "recall": recall,
            "recall_real": recall_real,
        }

    def _pictures(self, x, label, closest, test, spec) -> dict[str, np.ndarray]:
        shown = {}
        if spec.num_classes:
            classes = range(min(spec.num_classes, self.num_classes))
            real = test["x"], test["label"]
            shown["classes"] = pictures.labelled_grid(
                [x[label == c][: self.num_columns] for c in classes],
                [real[0][real[1] == c][: self.num_columns] for c in classes],
                _names(spec)[: len(classes)],
                captions=("samples", "real, held out"),
            )
        else:
            shown["samples"] = pictures.grid(x[: self.num_columns**2], self.num_columns)
        number = min(len(x), 48)
        shown["neighbours"] = pictures.pairs(
            x[:number],
            closest[:number],
            8,
            caption="sample | its nearest training example",
        )
        return shown


def _names(spec: types.DataSpec) -> tuple[str, ...]:
    return spec.class_names or tuple(str(c) for c in range(spec.num_classes))


def agreement(x, label, train, test, spec) -> dict[str, float]:
    """Returns what a classifier of real data says of samples and held-out data.

    Args:
      x, label: samples, and the classes they were asked to be.
      train, test: arrays 'x' and 'label' of the data.
      spec: of the data.
    """
    from sklearn.svm import SVC

    # C = 10 with the width that scikit-learn derives from the variance reaches 99 % in
    # cross-validation on the digits, at pixel scale as well as at [-1, 1].
    classifier = SVC(C=10.0, gamma="scale").fit(flat(train["x"]), train["label"])
    right = classifier.predict(flat(x)) == label
    numbers = {
        "agreement": float(right.mean()),
        "agreement_real": float(classifier.score(flat(test["x"]), test["label"])),
    }
    for c, name in enumerate(_names(spec)):
        if np.any(label == c):
            numbers[f"accuracy/{name}"] = float(right[label == c].mean())
    return numbers


def _memorisation(x, train, test) -> tuple[np.ndarray, dict[str, float]]:
    """The index of the nearest training example of each sample, and statistics."""
    train = flat(train)
    closest, distance = nearest(flat(x), train)
    _, usual = nearest(flat(test), train)
    median, median_real = float(np.median(distance)), float(np.median(usual))
    return closest, {
        "nearest_train": median,
        "nearest_train_real": median_real,
        "nearest_train_ratio": median / max(median_real, 1e-12),
        "too_close": float(np.mean(distance < np.quantile(usual, 0.01))),
    }
