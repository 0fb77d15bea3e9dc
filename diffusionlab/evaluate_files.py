"""mode=eval without a run: evaluators on the samples of a file against a reference.

The folder of results has `evaluation.json`, one file and the pictures of each evaluator
in `evals/`, `report.html`, and `inputs.json`, which binds it to one pair of inputs.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import zlib
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
from diffusionlab.evals import feature_store
from diffusionlab.file_inputs import Reference, Samples, about_files, open_files
from diffusionlab.types import DataSpec, EvalContext, EvalResult, Source

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

    An evaluator that needs a run is left out with a line, if another does not.

    Raises:
      ValueError, FileNotFoundError: what was given cannot be used; the message says
        why.
      NeedsRun: all of the evaluators need a run.
    """
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
    notes = {"samples": drawn.note, "reference": against.note}
    blocks, evaluators, skipped = {}, {}, {}
    for label, block in evals.items():
        blocks[label], notes[label] = _filled(label, block, len(source), against)
        try:
            data = source if against.statistics else against.train
            evaluators[label] = _built(label, blocks[label], data)
        except NeedsRun as error:
            skipped[label] = str(error)
            continue
        if known is not None and known.shape != drawn.spec.shape:
            _check_shapes(label, evaluators[label], room, drawn.spec, known)
    _check_some_are_left(evals, skipped)
    multihost.on_main("begin", lambda: _claim(out, inputs), _TIMEOUT)
    if multihost.is_main():
        print(f"{len(source):,} samples in {samples} against {reference}")
        print("".join(f"note: {note}\n" for note in notes.values() if note), end="")
    apply = inference.make_apply(mesh, _TIMEOUT)
    classes = feature_store.class_names(drawn.spec)
    with jax.set_mesh(mesh):
        for label, evaluator in evaluators.items():
            scratch = out / f".unfinished_{label}_{_short(blocks[label])}"
            context = _context(label, drawn, against, inputs["samples"])
            context = context._replace(apply=apply, room=room, scratch=scratch)
            try:
                result = evaluator(context)
            except NeedsRun as error:
                skipped[label] = str(error)
                continue
            multihost.barrier(f"end of {label}", _TIMEOUT)
            if multihost.is_main():
                _write(out, label, blocks[label], result, notes, classes)
                shutil.rmtree(scratch, ignore_errors=True)
                table = evaluate.table(result.numbers, result.intervals)
                said = evaluate.warnings_of(result)
                print(f"{label}:\n{table}{said}", flush=True)
    _check_some_are_left(evals, skipped)
    if multihost.is_main():
        print("".join(f"left out: {said}\n" for said in skipped.values()), end="")
        _finish(out, drawn, {**inputs, "left_out": skipped})
    return out


def _filled(label, block, num: int, against: Reference) -> tuple[dict, str]:
    """The block with what the files decide, and a note where that is not as asked."""
    path = f"config.evals.{label}"
    where = registry.target("evaluator", block.get("name"), path)
    accepted, done, note = registry.parameters(where), dict(block), ""
    if against.statistics and "reference" in accepted:
        done.setdefault("reference", against.statistics)
    # 0 already means as many as there are.
    if "num_samples" in accepted and accepted["num_samples"].default != 0:
        asked = done.setdefault("num_samples", num)
        if isinstance(asked, int) and asked > num:
            done["num_samples"] = num
            note = f"{path}.num_samples: {asked} asked for, all {num} there are taken"
    return registry.check("evaluator", done, path), note


def _built(label: str, block, data: Source):
    """Builds an evaluator and checks it against the data."""
    path = f"config.evals.{label}"
    evaluator = registry.build("evaluator", block, path)
    if hasattr(evaluator, "check_process"):
        _refuse(path, "a process")
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


class NeedsRun(RuntimeError):
    """An evaluator asks for more than samples; no ValueError, as it handles those."""


def _check_some_are_left(evals: Mapping, skipped: Mapping[str, str]) -> None:
    if len(skipped) == len(evals):
        raise NeedsRun(next(iter(skipped.values())))


def _refuse(path: str, what: str, *_, **__):
    raise NeedsRun(
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


def _short(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _claim(out: pathlib.Path, inputs: Mapping[str, Any]) -> None:
    """Makes the folder the place of the results of these inputs.

    Raises:
      ValueError: it is the place of others, or of something else.
    """
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
    names = []
    for name, picture in result.pictures.items():
        pictures.save_png(out / "evals" / f"{label}_{name}.png", picture)
        names.append(f"evals/{label}_{name}.png")
    about = {k: notes[k] for k in ("samples", "reference", label) if notes[k]}
    record = {
        "step": 0,
        "evaluator": label,
        "settings": block,
        "numbers": result.numbers,
        "intervals": result.intervals,
        "notes": {**result.notes, **about},
        "provenance": result.provenance,
        "class_names": class_names,
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


_OF_RUNS = ("step", "evaluator")
