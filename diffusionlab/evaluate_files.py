"""mode=eval without a run: evaluators on the samples of a file against a reference.

The folder of results has `evaluation.json`, one file and the pictures of each evaluator
in `evals/`, `report.html`, and `inputs.json`, which binds it to one pair of inputs.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusionlab import (
    evaluate,
    inference,
    machine,
    multihost,
    pictures,
    registry,
    report,
    settings,
    sharding,
    workdir,
)
from diffusionlab.evals import feature_store, scratch
from diffusionlab.file_inputs import Reference, Samples, about_files, open_files
from diffusionlab.types import DataSpec, EvalContext, EvalResult, Source

_OF_RUNS = ("step", "evaluator")  # keys of a record that say nothing without a run
_SPLITS = ("train", "test")
_SHOWN = 100  # samples in the picture of the report
_TIMEOUT = 600.0  # seconds that one of several processes waits for the others


def run(
    *,
    samples: str,
    reference: str,
    evals: Mapping[str, Mapping[str, Any]],
    out: pathlib.Path | None = None,
) -> pathlib.Path:
    """Evaluates the samples of a file and returns the folder with the results.

    Args:
      samples: path, see `ExampleFiles`.
      reference: path of examples or of statistics, a data set or the block of one.
      evals: blocks of evaluators by label, as they were given: what they do not say is
        taken from the files.
      out: folder of the results; by default beside the samples.

    An evaluator that needs a run, or both splits of a data set where there is one set,
    is left out with a line, unless all are.

    Raises:
      ValueError, FileNotFoundError: what was given cannot be used; the message says
        why.
      LeftOut: all of the evaluators need more than there is.
    """
    if not evals:
        raise ValueError("evals: empty; give at least one evaluator.")
    source, against = open_files(samples, "--samples"), Reference(reference)
    known = None if against.statistics else against.train.spec
    drawn = Samples(source, known)
    if out is None:
        path = pathlib.Path(samples).resolve()
        name = path.name if path.is_dir() else path.stem
        out = path.with_name(f"{name}_evaluation")
    inputs = {"samples": about_files(source), "reference": against.about}
    mesh = sharding.make_mesh(settings.Mesh())
    room = inference.make_room(mesh, _TIMEOUT)
    said = {"samples": drawn.note, "reference": against.note}
    blocks, notes, evaluators, skipped = {}, {}, {}, {}
    for label, block in evals.items():
        blocks[label], note = _filled(label, block, len(source), against)
        notes[label] = {k: v for k, v in {**said, "settings": note}.items() if v}
        try:
            evaluators[label] = _built(label, blocks[label], source, against)
        except LeftOut as error:
            skipped[label] = str(error)
            continue
        if known is not None and known.shape != drawn.spec.shape:
            _check_shapes(label, evaluators[label], room, drawn.spec, known)
    _check_some_are_left(evals, skipped)
    multihost.on_main("begin", lambda: _claim(out, inputs), _TIMEOUT)
    if multihost.is_main():
        print(f"{len(source):,} samples in {samples} against {reference}")
        found = dict.fromkeys(v for part in notes.values() for v in part.values())
        print("".join(f"note: {note}\n" for note in found), end="")
    apply = inference.make_apply(mesh, _TIMEOUT)
    classes = feature_store.class_names(drawn.spec)
    with jax.set_mesh(mesh):
        for label, evaluator in evaluators.items():
            context = _context(label, drawn, against, inputs["samples"])
            with scratch.own(out / f".unfinished_{label}", _TIMEOUT) as folder:
                context = context._replace(apply=apply, room=room, scratch=folder)
                try:
                    result = _evaluated(label, evaluator, context)
                except LeftOut as error:
                    skipped[label] = str(error)
                    continue
                if multihost.is_main():
                    _write(out, label, blocks[label], result, notes[label], classes)
            if multihost.is_main():
                table = evaluate.table(result.numbers, result.intervals)
                warned = evaluate.warnings_of(result)
                print(f"{label}:\n{table}{warned}", flush=True)
    _check_some_are_left(evals, skipped)
    if multihost.is_main():
        print("".join(f"left out: {said}\n" for said in skipped.values()), end="")
        _finish(out, drawn, {**inputs, "left_out": skipped})
    return out


def _filled(label, block, num: int, against: Reference) -> tuple[dict, str]:
    """The block with what the files decide, and a note where that is not as asked."""
    path = f"config.evals.{label}"
    where = registry.target("evaluator", block.get("name"), path)
    accepted, done, found = registry.parameters(where), dict(block), []
    if "reference" in accepted:
        if against.statistics:
            done.setdefault("reference", against.statistics)
        own = done.get("reference")
        if own not in (None, *_SPLITS, against.statistics):
            found.append(f"{path}.reference: '{own}' takes the place of --reference")
    elsewhere = done.get("reference", "train") not in (*_SPLITS, against.statistics)
    one_set = not against.has_splits and not (elsewhere and not against.statistics)
    if "baseline" in accepted and done.get("baseline") and one_set:
        done["baseline"] = ""
        found.append(
            f"{path}.baseline: left out: --reference is one set, and a set compared "
            "with itself says nothing"
        )
    # 0 already means as many as there are.
    if "num_samples" in accepted and accepted["num_samples"].default != 0:
        asked = done.setdefault("num_samples", num)
        if isinstance(asked, int) and asked > num:
            done["num_samples"] = num
            found.append(
                f"{path}.num_samples: {asked} asked for, all {num} there are taken"
            )
    return registry.check("evaluator", done, path), "; ".join(found)


def _built(label: str, block, source: Source, against: Reference):
    """Builds an evaluator and checks it against the data."""
    path = f"config.evals.{label}"
    evaluator = registry.build("evaluator", block, path)
    if hasattr(evaluator, "check_process"):
        _refuse(path, "a process")
    if getattr(evaluator, "compares_splits", False) and not against.has_splits:
        raise LeftOut(
            f"{path}: compares training with held-out data, and --reference is one "
            "set; name a data set that has both, without a split."
        )
    data = source if against.statistics else against.train
    try:
        if hasattr(evaluator, "check"):
            evaluator.check(data)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{path}.{error}") from None
    return evaluator


def _check_shapes(label, evaluator, room, spec: DataSpec, known: DataSpec) -> None:
    """Raises ValueError unless features do not depend on the shape of examples."""
    path = f"config.evals.{label}"
    said = (
        f"{path}: samples have shape {spec.shape}, the reference {known.shape}; give "
        "one size to both, or take a feature network that resizes."
    )
    if getattr(evaluator, "extractor", None) is None:
        raise ValueError(said)
    try:
        evaluator.extractor.check(spec)
    except ValueError as error:
        raise ValueError(f"{path}.extractor.{error}") from None
    network = evaluator.extractor.load(room)
    shapes = []
    for shape in (spec.shape, known.shape):
        x = network.prepare(np.zeros((1, *shape), np.float32))
        found = jax.eval_shape(network.apply, network.params, x)
        shapes.append({name: rows.shape for name, rows in found.items()})
    if shapes[0] != shapes[1]:
        raise ValueError(said)


class LeftOut(RuntimeError):
    """An evaluator asks for more than there is; no ValueError, as it handles those."""


def _check_some_are_left(evals: Mapping, skipped: Mapping[str, str]) -> None:
    if len(skipped) == len(evals):
        raise LeftOut(next(iter(skipped.values())))


def _evaluated(label: str, evaluator, context: EvalContext) -> EvalResult:
    """Runs an evaluator; what it raises says whose error it is."""
    try:
        return evaluator(context)
    except (ValueError, FileNotFoundError) as error:
        # The same error, as where it was raised decides whether it is a message.
        if len(error.args) == 1:
            error.args = (f"config.evals.{label}: {error}",)
        raise


def _refuse(path: str, what: str, *_, **__):
    raise LeftOut(
        f"{path}: needs a run: it asks for {what}, which sample files do not have; "
        "evaluate the run itself with --workdir."
    )


class _NeedsRun:
    """The process or sampler where there is none: says so as soon as it is used."""

    def __init__(self, what: str, refuse):
        self._what, self._refuse = what, refuse

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(self._what)


def _context(label: str, drawn: Samples, against: Reference, about) -> EvalContext:
    refuse = functools.partial(_refuse, f"config.evals.{label}")

    def stream(num_samples, start=0, sampler=None, sobol=False):
        if sampler is not None or sobol:
            refuse("a sampler" if sampler is not None else "samples from Sobol noise")
        return drawn.stream(num_samples, start)

    def draw(num_samples, sampler=None):
        if sampler is not None:
            refuse("a sampler")
        return drawn.draw(num_samples)

    return EvalContext(
        step=0,
        spec=drawn.spec,
        train=against.train,
        test=against.test,
        draw=draw,
        loss=functools.partial(refuse, "the training loss"),
        predict=functools.partial(refuse, "predictions"),
        compute=functools.partial(refuse, "predictions"),
        process=_NeedsRun("a process", refuse),
        sampler=_NeedsRun("a sampler", refuse),
        stream=stream,
        about=about,
    )


def _claim(out: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    """Makes the folder the place of the results of these inputs.

    Raises:
      ValueError: it is the place of others, or of something else, or no place at all.
    """
    try:
        _claim_folder(out, inputs)
    except OSError as error:
        raise ValueError(
            f"--out: cannot write '{out}': {error.strerror}; give another."
        ) from None


def _claim_folder(out: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    file = out / "inputs.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, ours in inputs.items():
            theirs = found.get(name, {})
            if _but_path(theirs) != _but_path(ours):
                raise ValueError(
                    f"--out: '{out}' has results of other {name}: "
                    f"{json.dumps(theirs)} there, {json.dumps(ours)} here; give "
                    "another --out, or remove it."
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out: '{out}' is there, and not as results of an evaluation; give "
            "another."
        )
    (out / "evals").mkdir(parents=True, exist_ok=True)
    workdir.write_json(file, inputs)


def _but_path(record: Mapping[str, Any]) -> dict[str, Any]:
    """A file that was moved is the same."""
    return json.loads(json.dumps({k: v for k, v in record.items() if k != "path"}))


def _write(out, label: str, block, result: EvalResult, notes, class_names) -> None:
    """Writes what one evaluator found: the record that `evaluate` writes of a run."""
    names = []
    for name, picture in result.pictures.items():
        pictures.save_png(out / "evals" / f"{label}_{name}.png", picture)
        names.append(f"evals/{label}_{name}.png")
    record = {
        "step": 0,
        "evaluator": label,
        "settings": block,
        "numbers": result.numbers,
        "intervals": result.intervals,
        "notes": {**result.notes, **notes},
        "provenance": result.provenance,
        "class_names": class_names,
        "versions": machine.versions(),
        "pictures": names,
    }
    workdir.write_json(out / "evals" / f"{label}.json", record)


def _finish(out: pathlib.Path, drawn: Samples, about: Mapping[str, Any]) -> None:
    """Writes all results in one file and as a page, those of earlier calls too."""
    if pictures.shows_images(drawn.spec.shape):
        x, label = drawn.draw(_SHOWN)
        shown = pictures.of_examples(x, label if drawn.spec.num_classes else None)
        pictures.save_png(out / "samples" / "step_00000000.png", shown)
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((out / "evals").glob("*.json"))
    }
    environment = machine.environment()
    workdir.write_json(out / "environment.json", [environment])
    workdir.write_json(
        out / "evaluation.json",
        {
            **about,
            "environment": environment,
            "evals": {
                label: {k: v for k, v in record.items() if k not in _OF_RUNS}
                for label, record in found.items()
            },
        },
    )
    report.write_report(out)
