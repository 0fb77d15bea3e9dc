"""The variance of samples against that of the data, by frequency: has it collapsed?

Along an orthonormal basis, with n samples of a class and S_i their variance about the
mean of the class along direction i, D_i the same of held-out data, both averaged over
the classes that have samples:

  ratio of a group of directions G = sum_{i in G} S_i / sum_{i in G} D_i            (1)
  variance_ratio = (1) over all directions = total variance of samples over data    (2)

Images use the two-dimensional DCT-II, of which a group is a ring of radial frequency
sqrt(((i / H)² + (j / W)²) / 2) in [0, 1); vectors use the principal directions of the
data within a class, from the widest on. A student that repeats itself has (2) near 0,
one that blurs has it low in high frequencies alone, one that sharpens too much or adds
noise has it above 1 there.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab import types
from diffusionlab.evals import arrays

_ENOUGH = 64  # samples of a class before its own ratio is believed: within 12.5 %
_NOTHING = 1e-9  # of the total variance: data do not vary in such a group


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleVariance:
    """Compares the variance of samples with that of held-out data. Numbers:

      variance_ratio: equation 2 of the module; 1 is right.
      variance_ratio/<class>: within one class, where there are classes.
      variance_by_frequency/<centre of the ring>: equation 1, of images.
      variance_by_direction/from_<first of the group>: equation 1, of vectors.

    A name that ends in `_real` is the figure for training data in place of samples.
    Where there are no classes, or not two samples of each, variance is about the mean
    of all. Its cost is that of `num_samples` samples: few enough to run it every few
    hundred steps.

    Attributes:
      num_samples: samples drawn; those of other evaluators at the same step are shared.
      num_real: held-out and training examples used, at most, of each; evenly spaced.
      num_bins: groups of directions; one that no direction falls into is left out.
      threshold: a variance ratio under it is a warning, on the terminal as well.
      every: steps between evaluations; 0 is at the end only.

    Raises:
      ValueError: a number is out of range.
    """

    num_samples: int = 1000
    num_real: int = 5000
    num_bins: int = 8
    threshold: float = 0.5
    every: int = 0

    processes = ("gaussian", "categorical")
    compares_splits = True  # training with held-out data: one set is not enough

    def __post_init__(self):
        for name, least in (("num_samples", 2), ("num_real", 2), ("num_bins", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: must be at least {least}, got {getattr(self, name)}."
                )
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: must be in [0, 1), got {self.threshold}.")

    def check(self, source: types.Source) -> None:
        """Raises ValueError unless the data are vectors or images (or videos)."""
        if len(source.spec.shape) == 2 or not source.spec.shape:
            raise ValueError(
                "name: the evaluator 'sample_variance' needs vectors [D], images "
                f"[H, W, C] or videos [F, H, W, C], got {source.spec.shape}."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        drawn = context.draw(self.num_samples)
        found = [np.asarray(part) for part in drawn]
        train = _arrays(context.train, self.num_real)
        test = _arrays(context.test, self.num_real)
        labels = (found[1], train[1], test[1])
        classes = _shared(labels) if context.spec.num_classes else None
        of_data = within(*test, classes)
        groups, unit = groups_of(context.spec.shape, self.num_bins, of_data)
        named = () if classes is None else tuple(classes)
        numbers, spectra = {}, {}
        for suffix, (x, label) in (("", found), ("_real", train)):
            ours = within(x, label, classes)
            spectra[suffix] = ours
            numbers[f"variance_ratio{suffix}"] = ours.total() / of_data.total()
            for c in named:
                name = _name(context.spec, c)
                ratio = ours.total(c) / of_data.total(c)
                numbers[f"variance_ratio{suffix}/{name}"] = ratio
            for centre, members in groups:
                ratio = ours.along(members) / of_data.along(members)
                numbers[f"variance_by_{unit}{suffix}/{centre}"] = ratio
        notes = {
            "data": f"{len(found[0])} samples, {len(test[0])} held-out examples",
            "variance": "about the mean of all, as classes are not compared"
            if classes is None
            else f"about the mean of each class, {len(classes)} of them",
        }
        few = self._collapsed(numbers, found[1], classes, context.spec)
        if few:
            notes["warning"] = few
        lines = [
            ("samples", [spectra[""].along(members) for _, members in groups]),
            ("held-out data", [of_data.along(members) for _, members in groups]),
        ]
        shown = {"spectrum": _spectrum(unit, [c for c, _ in groups], lines)}
        return types.EvalResult(numbers, notes, shown)

    def _collapsed(self, numbers, label, classes, spec) -> str:
        """What the terminal and the report warn of; '' where nothing has collapsed."""
        total = numbers["variance_ratio"]
        # So written, the threshold is also not reached by what is not finite.
        if not total >= self.threshold:
            return (
                f"collapse: the samples vary {total:.3g} times as much as the data "
                f"(variance_ratio, threshold {self.threshold:g}). Lower the learning "
                "rate, or look at the gradient norms and gaps of the method."
            )
        named = {
            _name(spec, c): numbers[f"variance_ratio/{_name(spec, c)}"]
            for c in (() if classes is None else classes)
            if np.sum(label == c) >= _ENOUGH
        }
        low = {name: q for name, q in named.items() if not q >= self.threshold}
        if not low:
            return ""
        words = ", ".join(f"{name}: {q:.3g}" for name, q in list(low.items())[:5])
        return (
            f"collapse of {len(low)} of {len(named)} classes: their samples vary under "
            f"{self.threshold:g} times as much as their data ({words})."
        )


@dataclasses.dataclass(frozen=True)
class Within:
    """Second moments about the mean of each class; see `within`.

    Attributes:
      by_class: class -> its variances along the basis (images) `[D]`, or covariance
        (vectors) `[D, D]`.
    """

    by_class: dict

    @property
    def mean(self) -> np.ndarray:
        """The average over classes."""
        return np.mean(list(self.by_class.values()), axis=0)

    def total(self, of: int | None = None) -> float:
        """Total variance, of one class or the average over all."""
        part = self.mean if of is None else self.by_class[of]
        return float(np.trace(part) if part.ndim == 2 else part.sum())

    def along(self, members: np.ndarray) -> float:
        """Variance in a group: indices of a basis, or directions `[D, k]`."""
        if self.mean.ndim == 2:
            return float(np.einsum("dk,de,ek->", members, self.mean, members))
        return float(self.mean[members].sum())


def within(x: np.ndarray, label: np.ndarray, classes: np.ndarray | None) -> Within:
    """Returns the variance of x about the mean of its class, unbiased.

    Args:
      x: `[N, D]`, or `[N, ..., H, W, C]`, whose directions are those of the DCT-II
        along H and W: `[H * W]`, channels and frames summed.
      label: `[N]`.
      classes: those to take apart; None takes all of x as one, as class 0.
    """
    x = np.asarray(x, np.float64)
    parts = {0: x} if classes is None else {int(c): x[label == c] for c in classes}
    found = {}
    for c, own in parts.items():
        centred = own - own.mean(axis=0)
        if x.ndim == 2:
            found[c] = centred.T @ centred / (len(own) - 1)
        else:
            found[c] = _dct_power(centred) / (len(own) - 1)
    return Within(found)


def _dct_power(x: np.ndarray) -> np.ndarray:
    """Returns the sum of squares of the orthonormal DCT-II, flat `[H * W]`."""
    from scipy import fft

    transformed = fft.dctn(x, axes=(-3, -2), norm="ortho")
    height, width = x.shape[-3:-1]
    power = np.square(transformed).sum(axis=-1)
    return power.reshape(-1, height, width).sum(axis=0).reshape(-1)


def groups_of(
    shape: tuple[int, ...], num_bins: int, of_data: Within
) -> tuple[list[tuple[str, np.ndarray]], str]:
    """Returns (name, members) of each group, and 'frequency' or 'direction'.

    Args:
      shape: of one example.
      num_bins: groups at most.
      of_data: says which directions are principal; groups in which the data do not
        vary are left out.
    """
    if len(shape) == 1:
        _, directions = np.linalg.eigh(of_data.mean)
        parts = np.array_split(np.arange(shape[0]), min(num_bins, shape[0]))
        ordered = directions[:, ::-1]
        # Not a bare number, which could be the name of a class.
        groups = [(f"from_{part[0] + 1}", ordered[:, part]) for part in parts]
    else:
        ring = rings(*shape[-3:-1], num_bins)
        groups = [
            (f"{(b + 0.5) / num_bins:.3g}", np.flatnonzero(ring == b))
            for b in np.unique(ring)
        ]
    least = _NOTHING * of_data.total()
    unit = "direction" if len(shape) == 1 else "frequency"
    return [(n, part) for n, part in groups if of_data.along(part) > least], unit


def rings(height: int, width: int, num_bins: int) -> np.ndarray:
    """Returns the ring of each DCT coefficient `[H * W]`, in 0 .. num_bins - 1."""
    i, j = np.arange(height)[:, None], np.arange(width)[None]
    # In integers under the root: 0.125 times 8 is then 1 exactly, on every machine.
    square = ((i * width) ** 2 + (j * height) ** 2) * num_bins**2
    return np.floor(np.sqrt(square / (2 * (height * width) ** 2))).astype(int).ravel()


def _arrays(source: types.Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    found = arrays.spread(source, limit)
    label = found.get("label", np.zeros(len(found["x"]), np.int32))
    return found["x"], label


def _shared(labels) -> np.ndarray | None:
    """The classes that are drawn, without those that the data lack; None if too few.

    Of each there must be two samples and two examples, or none is taken apart.
    """
    sets = [dict(zip(*np.unique(q, return_counts=True), strict=True)) for q in labels]
    classes = sorted(set.intersection(*map(set, sets)))
    if not classes or min(counts[c] for counts in sets for c in classes) < 2:
        return None
    return np.asarray(classes)


def _name(spec: types.DataSpec, c: int) -> str:
    return spec.class_names[c] if spec.class_names else str(c)


def _spectrum(unit: str, centres: list[str], lines) -> np.ndarray:
    """Variance by group on a logarithmic axis, uint8 `[H, W, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((6, 3.6), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, values), marker in zip(lines, "os", strict=True):
        axis.plot(range(len(centres)), values, marker=marker, label=name, alpha=0.8)
    axis.set_yscale("log")
    axis.set_xticks(range(len(centres)), centres)
    axis.set_xlabel(
        "radial frequency" if unit == "frequency" else "principal direction"
    )
    axis.set_ylabel("variance")
    axis.grid(True, which="both", color="0.92", lw=0.6)
    axis.legend(frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
