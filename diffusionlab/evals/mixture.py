"""A network on gaussian mixtures, against the exact answers.

For x ~ sum_k w_k N(mu_k, s² I) and z_t = alpha x + sigma eps, with
v_t = alpha² s² + sigma²:

  r_k(z_t) ∝ w_k exp(-|z_t - alpha mu_k|² / (2 v_t))                              (1)
  E[x | z_t] = sum_k r_k (mu_k + (alpha s² / v_t) (z_t - alpha mu_k))             (2)

Given the label, r is 1 at that component. The loss of any denoiser is that of (2) plus
its squared distance to (2), so this distance is the whole of what training can gain.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab import pictures, types
from diffusionlab.evals import arrays
from diffusionlab.metrics import neighbours

_INSIDE = 0.9973  # what lies within 3 standard deviations in one dimension


def exact_x(z_t, alpha, sigma, means, weights, std, label=None) -> np.ndarray:
    """Returns E[x | z_t] `[B, D]`, or E[x | z_t, label]; equations (1) and (2).

    Args:
      z_t: [B, D].
      alpha, sigma: scalars.
      means: [K, D] of the components.
      weights: [K].
      std: of every component, in every direction.
      label: [B] int, the component of each; None when it is not known.
    """
    z_t, means = np.asarray(z_t, np.float64), np.asarray(means, np.float64)
    variance = alpha**2 * std**2 + sigma**2
    offset = z_t[:, None] - alpha * means
    if label is None:
        score = np.log(weights) - np.sum(offset**2, axis=-1) / (2 * variance)
        share = np.exp(score - score.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
    else:
        share = np.eye(len(means))[label]
    return np.einsum("bk,bkd->bd", share, means + alpha * std**2 / variance * offset)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, num_directions: int) -> float:
    """Returns the mean over random directions of the Wasserstein-1 distance.

    Args:
      a, b: [N, D], equally many.
      num_directions: how many; the same ones at every call.
    """
    # Not a key of the run: every evaluation looks along the same directions.
    directions = np.random.default_rng(0).normal(size=(a.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    along_a, along_b = (np.sort(part @ directions, axis=0) for part in (a, b))
    return float(np.mean(np.abs(along_a - along_b)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Compares network and samples with a mixture; for the data source `mixture`.

    Numbers, lengths in units of the data unless said otherwise:

      excess: mean square of network x minus exact x, per dimension, averaged over
        `num_levels` times; `excess_by_logsnr/<logsnr>` by noise level.
      bayes: mean squared error per dimension of the exact denoiser at these times.
      inside: share of samples within the ball about their component that holds 99.73 %
        of it (3 standard deviations in one dimension).
      mean_error: rms per dimension, in component standard deviations, of the mean of
        the samples of a component against its own; averaged over components.
      std_ratio: spread of the samples within their component over the true one.
      sliced_wasserstein: samples to held-out data, over as many of each label.

    A name that ends in `_real` is the figure for training data in place of samples.

    Attributes:
      num_samples: samples drawn, and examples denoised.
      num_levels: times at which network and exact denoiser are compared.
      num_directions: of the sliced distance.
      every: steps between evaluations; 0 is at the end only.
    """

    num_samples: int = 1000
    num_levels: int = 10
    num_directions: int = 64
    every: int = 0

    def __post_init__(self):
        for name in ("num_samples", "num_levels", "num_directions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1.")

    def check(self, source: types.Source) -> None:
        """Raises ValueError unless the source knows its components."""
        if not all(hasattr(source, name) for name in ("means", "weights", "std")):
            raise ValueError(
                "name: the evaluator 'mixture' needs the data source 'mixture', which "
                f"knows its components; config.data.source is {type(source).__name__}."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        test = arrays.spread(context.test, self.num_samples)
        train = arrays.spread(context.train, self.num_samples)
        x, label = (np.asarray(part) for part in context.draw(self.num_samples))
        known = context.spec.num_classes > 0
        if not known:
            label = _closest(x, context.test.means)
        numbers = self._excess(context, test, known)
        numbers |= sample_statistics(x, label, context.test.means, context.test.std)
        real = sample_statistics(
            train["x"],
            train["label"] if known else _closest(train["x"], context.test.means),
            context.test.means,
            context.test.std,
        )
        numbers |= {f"{name}_real": value for name, value in real.items()}
        sets = (x, train["x"], test["x"])
        if known:
            sets = _same_labels(sets, (label, train["label"], test["label"]))
        ours, reals, held_out = sets
        numbers["sliced_wasserstein"] = self._distance(ours, held_out)
        numbers["sliced_wasserstein_real"] = self._distance(reals, held_out)
        notes = {
            "data": f"{len(x)} samples, {len(test['x'])} held-out examples",
            "excess": "against E[x | z_t, label]" if known else "against E[x | z_t]",
            "inside": f"exact value {_INSIDE}",
        }
        shown = {}
        if context.spec.shape == (2,):
            colour = test["label"] if known else _closest(test["x"], context.test.means)
            shown["scatter"] = pictures.scatter(
                [("samples", x, label), ("held-out data", test["x"], colour)]
            )
        return types.EvalResult(numbers, notes, shown)

    def _distance(self, a, b) -> float:
        number = min(len(a), len(b))
        return sliced_wasserstein(a[:number], b[:number], self.num_directions)

    def _excess(self, context, test, known) -> dict[str, float]:
        x, source = np.asarray(test["x"], np.float32), context.test
        label = test["label"] if known else np.zeros(len(x), np.int32)
        schedule, numbers, excess, bayes = context.process.schedule, {}, [], []
        for level in range(self.num_levels):
            time = np.float32((level + 0.5) / self.num_levels)
            alpha, sigma = (float(q) for q in schedule.alpha_sigma(time))
            eps = np.random.default_rng(level).normal(size=x.shape)
            z_t = (alpha * x + sigma * eps).astype(np.float32)
            t = np.full(len(x), time, np.float32)
            said = np.asarray(context.predict(z_t, t, label).x, np.float64)
            components = source.means, source.weights, source.std
            exact = exact_x(z_t, alpha, sigma, *components, label if known else None)
            excess.append(float(np.mean((said - exact) ** 2)))
            bayes.append(float(np.mean((x - exact) ** 2)))
            logsnr = 2 * np.log(max(alpha, 1e-20) / max(sigma, 1e-20))
            numbers[f"excess_by_logsnr/{logsnr:.2f}"] = excess[-1]
        means = {"excess": float(np.mean(excess)), "bayes": float(np.mean(bayes))}
        return means | numbers


def sample_statistics(x, label, means, std) -> dict[str, float]:
    """Returns `inside`, `mean_error` and `std_ratio` of x `[N, D]`, see `Mixture`."""
    from scipy import stats

    x, means = np.asarray(x, np.float64), np.asarray(means, np.float64)
    dimension = x.shape[1]
    radius = std * np.sqrt(stats.chi2.ppf(_INSIDE, dimension))
    inside = np.linalg.norm(x - means[label], axis=1) <= radius
    errors, spread, freedom = [], 0.0, 0
    for component in np.unique(label):
        own = x[label == component]
        errors.append(np.sqrt(np.mean((own.mean(axis=0) - means[component]) ** 2)))
        spread += np.sum((own - own.mean(axis=0)) ** 2)
        freedom += (len(own) - 1) * dimension
    return {
        "inside": float(inside.mean()),
        "mean_error": float(np.mean(errors) / std),
        "std_ratio": float(np.sqrt(spread / max(freedom, 1)) / std),
    }


def _closest(x, means) -> np.ndarray:
    """The component whose mean is nearest to each row of x."""
    return neighbours.nearest(np.asarray(x), np.asarray(means, np.float32))[0]


def _same_labels(sets, labels) -> list[np.ndarray]:
    """Takes as many of each label from every set, so that only the shapes differ."""
    rows: list[list[np.ndarray]] = [[] for _ in sets]
    for c in np.unique(labels[-1]):
        places = [np.flatnonzero(label == c) for label in labels]
        shared = min(len(place) for place in places)
        for row, place in zip(rows, places, strict=True):
            row.append(place[:shared])
    return [part[np.concatenate(row)] for part, row in zip(sets, rows, strict=True)]
