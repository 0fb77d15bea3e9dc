"""Samples against data by the features of a network: FID and its relatives.

Samples are drawn batch by batch, and only their features are kept, on disk; whatever
interrupts that, the same command goes on from the last batch. The features of the
reference are computed once and kept for every later evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusionlab import multihost, types
from diffusionlab.evals import feature_store, reference, statistics_file
from diffusionlab.features.base import Network
from diffusionlab.metrics import frechet, kernel, neighbours
from diffusionlab.metrics.base import Features, Metric

_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """Runs metrics on the features of samples and of a reference.

    The numbers are those of the metrics, by their names. One that ends in `_real` is
    the same for the examples of `baseline` in place of the samples: what a perfect
    sampler would reach. They are as many as the samples, evenly spaced, or where there
    are fewer, all of them, which a note says: most metrics depend on the number.

    Attributes:
      extractor: block of the feature network.
      metrics: blocks; empty is Frechet distance, kernel distance, precision and recall,
        density and coverage, or with a file of statistics the first of these alone.
      num_samples: samples drawn.
      reference: 'train' or 'test' data of the run, or an .npz file with `mu` and
        `sigma`, for metrics that need no more.
      num_reference: examples of the reference at most, evenly spaced; 0 is all.
      baseline: 'train' or 'test' data that stand in for samples; '' is none.
      save_reference: an .npz file to write, with `mu`, `sigma` and `num` of the
        reference's features, as other programs read them; '' is none.
      sobol: draw the initial noise from a scrambled Sobol sequence; deterministic
        samplers only.
      every: steps between evaluations; 0 is at the end only.
    """

    extractor: Any
    metrics: tuple = ()
    num_samples: int = 50_000
    reference: str = "train"
    num_reference: int = 0
    baseline: str = ""
    save_reference: str = ""
    sobol: bool = False
    every: int = 0

    processes = ("gaussian", "categorical")

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(
                f"num_samples: must be at least 2, got {self.num_samples}."
            )
        if self.num_reference < 0:
            raise ValueError(
                f"num_reference: must be at least 0, got {self.num_reference}."
            )
        if self.save_reference:
            if not self.save_reference.endswith(".npz"):
                raise ValueError(
                    "save_reference: expected a name that ends in .npz, got "
                    f"'{self.save_reference}'."
                )
            if self.reference not in _SPLITS:
                raise ValueError(
                    "save_reference: the reference is a file of statistics already; "
                    "copy it."
                )
        if self.baseline and self.baseline not in _SPLITS:
            raise ValueError(
                f"baseline: expected 'train', 'test' or '', got '{self.baseline}'."
            )
        if self.baseline and self.baseline == self.reference:
            raise ValueError(
                f"baseline: '{self.baseline}' is the reference itself; a set compared "
                "with itself says nothing."
            )

    def check(self, source: types.Source) -> None:
        """Raises ValueError or FileNotFoundError where it cannot work on these data."""
        try:
            self.extractor.check(source.spec)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"extractor.{error}") from None
        kinds = [type(metric) for metric in self._metrics()]
        if twice := {kind.__name__ for kind in kinds if kinds.count(kind) > 1}:
            raise ValueError(f"metrics: {', '.join(sorted(twice))} is there twice.")
        for metric in self._metrics():
            if missing := set(metric.needs) - set(self.extractor.outputs):
                raise ValueError(
                    f"metrics: {type(metric).__name__} needs {sorted(missing)} of the "
                    f"extractor, which gives {list(self.extractor.outputs)}."
                )
        self._check_files()

    def _check_files(self) -> None:
        if self.save_reference and "features" not in self._outputs():
            raise ValueError(
                "save_reference: no metric needs the features to be saved."
            )
        if self.reference in _SPLITS:
            return
        if not pathlib.Path(self.reference).is_file():
            raise FileNotFoundError(
                f"reference: expected 'train', 'test' or an .npz file with 'mu' and "
                f"'sigma', got '{self.reference}'."
            )
        for metric in self._metrics():
            if getattr(metric, "reference_rows", False):
                raise ValueError(
                    f"metrics: {type(metric).__name__} needs the features of every "
                    f"example of the reference, and '{self.reference}' has statistics "
                    "only; leave it out, or give 'train' or 'test'."
                )

    def _outputs(self) -> list[str]:
        return sorted({name for metric in self._metrics() for name in metric.needs})

    def _metrics(self) -> tuple[Metric, ...]:
        if self.metrics:
            return self.metrics
        if self.reference not in _SPLITS:
            return (frechet.Frechet(),)
        return (
            frechet.Frechet(),
            kernel.Kernel(),
            neighbours.PrecisionRecall(),
            neighbours.DensityCoverage(),
        )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        network = self.extractor.load(context.room)
        outputs = self._outputs()
        against = self._reference(context, network, outputs)
        if self.save_reference:
            save = functools.partial(self._save, against, network, outputs)
            multihost.on_main("write statistics", save, context.room.timeout)
        samples = self._samples(context, network, outputs)
        result = _measure(self._metrics(), samples, against)
        if self.baseline:
            number = self.num_samples
            real = self._of_split(context, self.baseline, network, outputs, number)
            if real.num < number:
                result.notes["real data"] = (
                    f"{real.num} examples stand for {number} samples, as there are no "
                    "more: metrics that depend on the number differ by that, too"
                )
            found = _measure(self._metrics(), real, against)
            for name, value in found.numbers.items():
                result.numbers[real_name(name)] = value
            for name, interval in found.intervals.items():
                result.intervals[real_name(name)] = interval
        about = {
            "samples": {
                "num": samples.num,
                "sha256": samples.digest,
                "sobol": self.sobol,
                **context.about,
            },
            "reference": _about(against),
            "network": network.about,
        }
        if self.baseline:
            about["baseline"] = _about(real)
        return result._replace(provenance=about)

    def _samples(self, context, network: Network, outputs) -> feature_store.Stored:
        def batches(start):
            for x, label in context.stream(
                self.num_samples, start=start, sobol=self.sobol
            ):
                yield x, label if context.spec.num_classes else None

        folder = context.scratch / "samples"
        feature_store.fill(
            folder,
            batches,
            self.num_samples,
            network,
            outputs,
            context.apply,
            name="samples",
            identity=f"{network.about} {outputs} {self.num_samples} {self.sobol}",
            timeout=context.room.timeout,
        )
        names = feature_store.class_names(context.spec)
        examples = functools.partial(self._again, context)
        return feature_store.Stored(folder, "samples", names, examples)

    def _again(self, context, indices) -> np.ndarray:
        """Draws some of the samples again, in the batches in which they were drawn."""
        drawn: dict[int, np.ndarray] = {}
        size = len(next(iter(context.stream(self.num_samples, sobol=self.sobol)))[0])
        for start in sorted({int(i) // size * size for i in indices}):
            batch = context.stream(self.num_samples, start=start, sobol=self.sobol)
            drawn[start] = next(iter(batch))[0]
        return np.stack([drawn[int(i) // size * size][int(i) % size] for i in indices])

    def _reference(self, context, network: Network, outputs) -> Features:
        if self.reference in _SPLITS:
            limit = self.num_reference
            return self._of_split(context, self.reference, network, outputs, limit)
        x = network.prepare(np.zeros((1, *context.spec.shape), np.float32))
        shapes = jax.eval_shape(network.apply, network.params, x)
        widths = {name: shapes[name].shape[1] for name in outputs}
        return statistics_file.read(self.reference, network, widths)

    def _save(self, against: Features, network: Network, outputs) -> None:
        """Writes the statistics of the reference; the same ones may be there already.

        Raises:
          ValueError: other statistics are there.
        """
        about = {
            "reference": _about(against),
            "network": network.about,
            "fingerprint": network.fingerprint,
        }
        kept = [name for name in outputs if name in statistics_file.OUTPUTS]
        path = pathlib.Path(self.save_reference)
        if not path.exists():
            statistics_file.write(path, against, about, kept)
        elif statistics_file.read(path).about != about:
            raise ValueError(
                f"save_reference: '{path}' holds other statistics; give the name of a "
                "new file."
            )

    def _of_split(self, context, split: str, network: Network, outputs, limit: int):
        source = context.train if split == "train" else context.test
        return reference.of_source(
            source, network, outputs, context.apply, context.room, limit
        )


def _measure(metrics, samples: Features, against: Features) -> types.EvalResult:
    total = types.EvalResult({}, {}, {}, {})
    for metric in metrics:
        found = metric(samples, against)
        total.numbers.update(found.numbers)
        first = next(iter(found.numbers))
        for name, text in found.notes.items():
            total.notes[f"warning: {first}" if name == "warning" else name] = text
        total.pictures.update(found.pictures)
        total.intervals.update(found.intervals)
    return total


def real_name(name: str) -> str:
    """'frechet' -> 'frechet_real', 'class_frechet/3' -> 'class_frechet_real/3'."""
    first, slash, rest = name.partition("/")
    return f"{first}_real{slash}{rest}"


def _about(features: Features) -> Mapping[str, Any]:
    num = features.num if np.isfinite(features.num) else None
    known = {"name": features.name, "num": num}
    if digest := getattr(features, "digest", None):
        known["sha256"] = digest
    return known
