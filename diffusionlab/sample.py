"""mode=sample: any number of samples from a run, as npz and as a picture or text.

Sample i is a function of (seed, i) alone. The job is cut into parts of equal size; a
part is written whole or not at all, so an interrupted job continues where it stopped,
and processes started with --part=0/2 and --part=1/2 split it. Whoever finishes the
last part joins them. The newest checkpoint of a run that goes on is another one later:
--step keeps to one.
"""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np

from diffusionlab import (
    evaluate,
    inference,
    infilling,
    multihost,
    pictures,
    restore,
    texts,
    workdir,
)
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.experiment import Experiment


def sample(
    experiment: Experiment,
    mesh,
    folder: pathlib.Path,
    *,
    num_samples: int,
    label: int | None,
    given: infilling.Given | None = None,
    seed: int,
    step: int | None,
    ema: str,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
    out: pathlib.Path | None = None,
) -> pathlib.Path:
    """Draws samples from a checkpoint of a run.

    Args:
      experiment: of the run.
      mesh: where it runs.
      folder: the run directory.
      num_samples: how many.
      label: of every sample; None draws the classes in turn.
      given: text that is part of every sample.
      seed: of the samples.
      step: of the checkpoint; None is the newest.
      ema: name of the average; see `restore.check_ema`.
      batch_size: samples per part.
      part: (which, of how many) processes that share the job.
      out: folder of the job; by default one in `samples/` named after the job.

    Returns:
      The folder with `samples.npz` (once every part is there) and `samples.png`, or
      `samples.txt` of tokens.

    Raises:
      ValueError: a flag does not fit the run, or `out` holds another job.
    """
    inference.check_samples(experiment)
    restore.check_ema(experiment, ema)
    _check(experiment, num_samples, label, batch_size, part)
    sampler = infilling.sampler(experiment, given)
    checkpoints = Checkpoints(folder)
    timeout = experiment.checkpoint.barrier_timeout
    newest = evaluate.chosen_step(checkpoints, step)
    newest = multihost.all_of("which checkpoint", newest, timeout)[0]
    if step is None and part[1] > 1 and not _is_finished(folder, newest):
        raise ValueError(
            f"--part: '{folder}' is not finished, and its newest checkpoint may be "
            f"another one for each part; give --step={newest} to all of them."
        )
    step = newest
    name = f"step_{step:08d}_ema-{ema}_seed-{seed}_n-{num_samples}"
    name += "" if label is None else f"_label-{label}"
    name += "" if given is None else f"_{given.flag}-{given.digest}"
    out = out or folder / "samples" / name
    job = {
        "run": str(folder),
        "step": step,
        "ema": ema,
        "seed": seed,
        "num_samples": num_samples,
        "label": label,
        "batch_size": batch_size,
        "given": given and given._asdict(),
        **inference.sampler_record(experiment),
    }
    if any(experiment.references):
        job["reference_steps"] = list(restore.reference_steps(experiment))
    _claim(out, job)
    if (out / "samples.npz").exists():
        return out
    starts = list(range(0, num_samples, batch_size))
    todo = [s for s in starts[part[0] :: part[1]] if not _part_file(out, s).exists()]
    # No part is joined before each of several processes has seen which are there.
    multihost.barrier("look for parts", timeout)
    if todo:
        params = restore.restore(experiment, checkpoints, step, ema, mesh)
        draw = inference.make_draw(experiment, mesh, sampler)
    for start in todo:
        # Every part has the same size, so that sample i does not depend on its part.
        indices = np.arange(start, start + batch_size)
        labels = inference.labels_in_turn(experiment, indices, label)
        x = inference.draw_many(draw, mesh, params, seed, indices, labels, batch_size)
        keep = min(batch_size, num_samples - start)
        if multihost.is_main():
            file = _part_file(out, start)
            _write_npz(file, x[:keep], labels[:keep], experiment)
            print(f"samples {start + keep:,}/{num_samples:,}", flush=True)
    if multihost.is_main():
        _join(out, starts, experiment)
    return out


def _check(experiment, num_samples, label, batch_size, part) -> None:
    classes = experiment.spec.num_classes
    if num_samples < 1 or batch_size < 1:
        raise ValueError("--num_samples, --batch_size: must be at least 1.")
    if label is not None and not 0 <= label < classes:
        raise ValueError(
            f"--label: expected 0 to {classes - 1}, got {label}."
            if classes
            else f"--label: the data have no classes, got {label}."
        )
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"--part: expected K/N with 0 <= K < N, got {part}.")


def _is_finished(folder: pathlib.Path, step: int) -> bool:
    """Whether the run ended at `step`: it will have no newer checkpoint."""
    result = folder / "result.json"
    return result.is_file() and json.loads(result.read_text())["step"] == step


def _claim(out: pathlib.Path, job: dict) -> None:
    file = out / "job.json"
    if file.is_file():
        found = workdir.read_json(file)
        differing = [k for k in job if found.get(k) != job[k] and k != "run"]
        if differing:
            raise ValueError(
                f"--out: '{out}' holds samples of another job (differs in "
                f"{', '.join(differing)}); give another --out."
            )
    elif multihost.is_main():
        out.mkdir(parents=True, exist_ok=True)
        workdir.write_json(file, job)


def _part_file(out: pathlib.Path, start: int) -> pathlib.Path:
    return out / f"part_{start:08d}.npz"


def _write_npz(file: pathlib.Path, x, labels, experiment) -> None:
    arrays = {"x": x} | ({"label": labels} if experiment.spec.num_classes else {})
    # Data lie in [-1, 1], samples may lie beyond: whoever reads them has to know.
    if not texts.shows_text(experiment.spec):
        arrays["range"] = np.float32([-1, 1])
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, file)


def _join(out: pathlib.Path, starts, experiment) -> None:
    files = [_part_file(out, start) for start in starts]
    missing = sum(not file.exists() for file in files)
    # Parts go when they are joined: by another process, perhaps just now.
    if (out / "samples.npz").exists():
        return
    if missing:
        print(f"{out}: {missing} parts are still to come from other processes.")
        return
    try:
        parts = [dict(np.load(file)) for file in files]
    except FileNotFoundError:
        if (out / "samples.npz").exists():
            return
        raise
    x = np.concatenate([p["x"] for p in parts])
    labels = (
        np.concatenate([p["label"] for p in parts])
        if experiment.spec.num_classes
        else None
    )
    if texts.shows_text(experiment.spec):
        said = texts.of_tokens(experiment.train_source, x)
        texts.save(out / "samples.txt", texts.blocks(said, labels))
    else:
        shown = x[:256], None if labels is None else labels[:256]
        pictures.save_png(out / "samples.png", pictures.of_examples(*shown))
    _write_npz(out / "samples.npz", x, labels, experiment)
    for file in files:
        file.unlink(missing_ok=True)
