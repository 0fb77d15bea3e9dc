"""mode=eval: run evaluators on one checkpoint, or on each new one of a run."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusionlab import config as config_lib
from diffusionlab import inference, machine, multihost, pictures, restore, workdir
from diffusionlab.checkpoint import CheckpointError, Checkpoints
from diffusionlab.evals import feature_store, sample_quality, scratch
from diffusionlab.experiment import Experiment
from diffusionlab.types import EvalContext, EvalResult, Sampler

_MAX_KEPT = 2**28  # bytes of samples that evaluators share


class Evaluation:
    """Compiled functions of one experiment, shared by its evaluators.

    Args:
      experiment: with the evaluators.
      mesh: where it runs.
      folder: the run directory; results go to `evals/`.
    """

    def __init__(self, experiment: Experiment, mesh, folder: pathlib.Path):
        self._experiment, self._mesh, self._folder = experiment, mesh, folder
        self._draws = {}  # by sampler
        self._kept: dict | None = None  # batches of samples, while evaluators run
        self._loss = inference.make_loss(experiment, mesh)
        self._predict = inference.make_plain_predict(experiment, mesh)
        self._compute = inference.make_compute(experiment, mesh)
        self._timeout = experiment.checkpoint.barrier_timeout
        self._apply = inference.make_apply(mesh, self._timeout)
        self._room = inference.make_room(mesh, self._timeout)

    def run(
        self,
        params: Mapping[str, Any],
        step: int,
        labels,
        ema: str,
        variants: Mapping[str, str] | None = None,
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Runs the evaluators named by `labels` and writes evals/*.json.

        Args:
          params: by role.
          step: of the parameters.
          labels: names in `config.evals`.
          ema: name of the average that `params` are.
          variants: by label, the start of a file name where the result is another
            than that of the run itself.

        Returns:
          'eval/<label>/<name>' -> number, and -> interval of those that have one.
        """
        self._kept = {}
        try:
            return self._run(params, step, labels, ema, variants or {})
        finally:
            self._kept = None

    def _run(self, params, step, labels, ema, variants):
        numbers, intervals = {}, {}
        about = self._about(params, step, ema) if labels else {}
        for label in labels:
            variant = variants.get(label, "")
            stem = f"step_{step:08d}_{variant}{label}"
            unfinished = f".unfinished_{stem}_{short(about)}"
            with scratch.own(self._folder / "evals" / unfinished, self._timeout) as own:
                context = self._context(params, step, about, own)
                try:
                    result = self._experiment.evals[label](context)
                except (ValueError, FileNotFoundError) as error:
                    # The same one, so that a mistake of ours keeps its traceback.
                    if len(error.args) == 1:
                        said = f"config.evals.{label}: at step {step}, {error}"
                        error.args = (said,)
                    raise
                if multihost.is_main():
                    self._write(stem, label, variant, step, about, result)
            if multihost.is_main() and (said := warnings_of(result)):
                print(f"{label}:{said}", flush=True)
            numbers |= {f"eval/{label}/{k}": v for k, v in result.numbers.items()}
            intervals |= {f"eval/{label}/{k}": v for k, v in result.intervals.items()}
        return numbers, intervals

    def _about(self, params, step: int, ema: str) -> dict[str, Any]:
        """Where samples come from: what is the same gives the same samples."""
        references = self._experiment.references
        steps = restore.reference_steps(self._experiment)
        return {
            "step": step,
            "ema": ema,
            "weights": inference.digest(params),
            "seed": self._experiment.seed,
            "batch_size": self._experiment.logging.num_samples,
            **inference.sampler_record(self._experiment),
            "reference_steps": {
                r.path: s for r, s in zip(references, steps, strict=True) if r
            },
        }

    def draw_examples(
        self, params, num: int, sampler: Sampler | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns `num` samples of the run's own seed, and their labels.

        They are drawn as the config says, or with another `sampler`.
        """
        parts = list(self._stream(params, num, sampler=sampler))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _stream(
        self,
        params,
        num: int,
        start: int = 0,
        sampler: Sampler | None = None,
        **options,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if sampler not in self._draws:
            self._draws[sampler] = inference.make_draw(
                self._experiment, self._mesh, sampler
            )
        draw = functools.partial(self._drawn, sampler)
        return inference.stream(
            self._experiment, self._mesh, draw, params, num, start, **options
        )

    def _drawn(self, sampler, params, seed, indices, labels, *noise) -> np.ndarray:
        """A batch; in one `run` the evaluators share it, up to a limit of memory."""
        batch = sampler, int(indices[0]), len(indices), bool(noise)
        if self._kept is None or batch not in self._kept:
            x = self._draws[sampler](params, seed, indices, labels, *noise)
            if self._kept is None or x.nbytes * (len(self._kept) + 1) > _MAX_KEPT:
                return x
            self._kept[batch] = x
        return self._kept[batch]

    def _context(self, params, step, about, own) -> EvalContext:
        experiment, timeout = self._experiment, self._timeout

        def loss(batch, index):
            with multihost.together("a batch of losses", timeout):
                return jax.device_get(self._loss(params, batch, index))

        def predict(z, t, label=None):
            if jax.process_count() == 1:
                return self._predict(params, z, t, label)
            with multihost.together("a batch of predictions", timeout):
                return jax.block_until_ready(self._predict(params, z, t, label))

        def compute(function, *arrays, guided=False):
            with multihost.together("a computation", timeout):
                return self._compute(params, function, *arrays, guided=guided)

        return EvalContext(
            step=step,
            spec=experiment.spec,
            train=experiment.train_source,
            test=experiment.test_source,
            draw=functools.partial(self.draw_examples, params),
            loss=loss,
            predict=predict,
            compute=compute,
            process=experiment.process,
            sampler=experiment.sampler,
            stream=functools.partial(self._stream, params),
            apply=self._apply,
            room=self._room,
            scratch=own,
            about={"run": str(self._folder), **about},
        )

    def _write(
        self, stem: str, label: str, variant: str, step: int, about, result: EvalResult
    ) -> None:
        folder = self._folder / "evals"
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for name, picture in result.pictures.items():
            pictures.save_png(folder / f"{stem}_{name}.png", picture)
            names.append(f"evals/{stem}_{name}.png")
        record = {
            "step": step,
            "evaluator": f"{variant}{label}",
            "settings": self._experiment.config["evals"][label],
            **inference.sampler_record(self._experiment),
            "reference_steps": about["reference_steps"],
            "numbers": result.numbers,
            "intervals": result.intervals,
            "notes": result.notes,
            "provenance": result.provenance,
            "class_names": feature_store.class_names(self._experiment.spec),
            "versions": machine.versions(),
            "pictures": names,
        }
        workdir.write_json(folder / f"{stem}.json", record)


def table(
    numbers: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Aligned lines 'name  value  [low, high]  real data: value'.

    Args:
      numbers: by name; one whose name ends in '_real' stands beside its own figure.
      intervals: of some of them, 95 %.
    """
    intervals, lines = intervals or {}, []
    real = {name: pictured for name in numbers if (pictured := _real(name)) in numbers}
    for name, value in numbers.items():
        if name in real.values():
            continue
        words = ["", ""]
        if name in intervals:
            words[0] = "[{:.4g}, {:.4g}]".format(*intervals[name])
        if name in real:
            words[1] = f"real data: {numbers[real[name]]:.4g}"
        lines.append((name, f"{value:.4g}", *words))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
    return "\n".join(
        "  "
        + "  ".join(
            [word.ljust(width) for word, width in zip(line, widths, strict=False)]
            + [line[3]]
        ).rstrip()
        for line in lines
    )


def warnings_of(result: EvalResult) -> str:
    """What may be wrong with the numbers, a line each; '' if nothing."""
    found = {k: v for k, v in result.notes.items() if k.startswith("warning")}
    return "".join(f"\n  {name}: {text}" for name, text in found.items())


def _real(name: str) -> str:
    """The same figure for real data; names may begin with 'eval/<label>/'."""
    label, first = re.match(r"(eval/[^/]*/)?(.*)", name, re.DOTALL).groups()
    return (label or "") + sample_quality.real_name(first)


def evaluate(
    experiment: Experiment,
    mesh,
    folder: pathlib.Path,
    *,
    step: int | None,
    ema: str,
    follow: bool,
    poll_seconds: float = 5.0,
) -> None:
    """Evaluates one checkpoint, or every new one until the run is finished.

    Args:
      experiment: of the run.
      mesh: where it runs.
      folder: the run directory.
      step: of the checkpoint; None is the newest.
      ema: name of the average; see `restore.check_ema`.
      follow: wait for the first checkpoint, and go on with each new one; ends after
        that of the last step, so of a run that stopped early it waits for the rest.
      poll_seconds: how often to look for a new one.

    Raises:
      ValueError: there is no checkpoint of that step.
    """
    restore.check_ema(experiment, ema)
    if follow and not workdir.saved_steps(folder):
        if multihost.is_main():
            print(f"'{folder}' has no checkpoint yet; waiting for it", flush=True)
        while not workdir.saved_steps(folder):
            time.sleep(poll_seconds)
    checkpoints = Checkpoints(folder)
    evaluation = Evaluation(experiment, mesh, folder)
    variant = "" if ema == restore.default_ema(experiment) else f"ema-{ema}_"
    own = config_lib.completed(workdir.read_config(folder))
    record = inference.sampler_record(experiment)
    if any(own.get(k) != v for k, v in record.items()):
        # Another sampler than the run's own: its results lie beside, not in the place
        # of, those of the run.
        variant += f"sampler-{short(record)}_"
    variants = {
        label: variant + _changed(folder, variant, label, block, own)
        for label, block in experiment.config["evals"].items()
    }

    def agreed(number: int) -> int:
        """What process 0 sees: the run may save between the looks of two."""
        timeout = experiment.checkpoint.barrier_timeout
        return multihost.all_of("which checkpoint", number, timeout)[0]

    def one(chosen):
        params = restore.restore(experiment, checkpoints, chosen, ema, mesh)
        found = evaluation.run(params, chosen, experiment.evals, ema, variants)
        if multihost.is_main():
            print(f"step {chosen}, ema {ema}:\n{table(*found)}", flush=True)

    if not follow:
        one(agreed(chosen_step(checkpoints, step)))
        return
    done: set[int] = set()
    last = experiment.train.num_steps
    while last not in done:
        chosen = agreed(min(set(checkpoints.steps()) - done, default=-1))
        if chosen < 0:
            time.sleep(poll_seconds)
            continue
        try:
            one(chosen)
        except CheckpointError:
            if agreed(chosen in checkpoints.steps()):
                raise
            # The run keeps only so many, and went on while we evaluated others.
            print(f"step {chosen}: its checkpoint was removed meanwhile", flush=True)
        done.add(chosen)


def short(record: Mapping[str, Any]) -> str:
    """A short name of JSON."""
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _changed(folder, variant, label, block, own) -> str:
    """Part of a file name that tells other settings of an evaluator from the first.

    Those are the ones of the run's own config; where it does not have the evaluator,
    they are those of the first result of this name.
    """
    first = own.get("evals", {}).get(label)
    for path in sorted((folder / "evals").glob(f"step_*_{variant}{label}.json")):
        if first is not None:
            break
        found = workdir.read_json(path)
        if found["evaluator"] == f"{variant}{label}":
            first = found.get("settings")
    what, theirs = (
        {k: v for k, v in (b or {}).items() if k != "every"} for b in (block, first)
    )
    return "" if first is None or what == theirs else f"settings-{short(what)}_"


def chosen_step(checkpoints: Checkpoints, step: int | None) -> int:
    """Returns the step to restore: the one asked for, or the newest.

    Raises:
      ValueError: there is none; lists those there are.
    """
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(
            f"{checkpoints.folder}: holds no finished checkpoint yet; train further."
        )
    if step is None:
        return steps[-1]
    if step not in steps:
        raise ValueError(f"--step: no checkpoint of step {step}; there are: {steps}.")
    return step
