"""Every method of distillation at every number of steps, in one table.

  python benchmarks/distillation.py --data=mixture [--steps=1,2,4,8] [--runs=runs]
  python benchmarks/distillation.py --data=digits --methods=moment_matching,boot
  python benchmarks/distillation.py --data=text
  python benchmarks/distillation.py --data=digits_tokens

Trains the teacher if it is not there, then a student of each method at each number of
steps, by the program itself and with the config that the method has; a finished student
is not trained again, an interrupted one goes on. All of them, and the teacher by its
own samplers at as many steps and at 256, are measured on equally many samples, see
`distillation_measures.py`. In RUNS/distillation_DATA/ lie the students, a log of each,
and the result: table.md, table.json, table.png.

More flags are given to every student: --config.train.num_steps=100.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import distillation_measures as measures
import jax

from diffusionlab import config as config_lib
from diffusionlab import (
    experiment,
    inherit,
    main,
    pictures,
    registry,
    restore,
    sharding,
    train,
    workdir,
    writers,
)
from diffusionlab.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
LONG = 256
_ERRORS = (ValueError, RuntimeError, OSError)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method takes part.

    Attributes:
      steps: at which numbers of steps it exists; None is all.
      of_tokens: whether it is for tokens; the others are for numbers.
      why: what a dash in its row means.
      notes: what is otherwise than in the other rows, by data.
    """

    steps: tuple[int, ...] | None = None
    of_tokens: bool = False
    why: str = ""
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


METHODS = {
    "multistep_consistency": Method(),
    "moment_matching": Method(),
    "moment_matching_instant": Method(
        notes={
            "mixture": "its teacher is runs/mixture, which was trained: the exact "
            "denoiser has no second moments"
        }
    ),
    "em_distillation": Method(),
    "diff_instruct": Method(),
    "distribution_matching": Method(),
    "distribution_matching_2": Method(),
    "f_divergence": Method(),
    "score_identity": Method(),
    "progressive": Method(),
    "tract": Method(),
    "consistency_distillation": Method(),
    "consistency_training": Method(),
    "continuous_consistency": Method(),
    "reflow": Method(),
    "discrete_moment_matching": Method(of_tokens=True),
    "self_distillation_through_time": Method(of_tokens=True),
    "boot": Method(
        (1,), why="its student answers noise at once, there is no second step"
    ),
    "guided": Method(
        (),
        why="makes one evaluation of the two of guidance and takes as many steps as "
        "its teacher; progressive makes few of them",
    ),
}


def main_program() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--data", choices=measures.DATA, default="mixture")
    flags.add_argument("--methods", help="all that are for such data")
    flags.add_argument("--steps", help="1,2,4,8; of tokens 4,8,16 and of text 32 too")
    flags.add_argument("--runs", type=pathlib.Path, default="runs")
    flags.add_argument(
        "--num_samples", type=int, help="200,000; of digits 1,500, of text 256"
    )
    args, others = flags.parse_known_args()
    for word in others:
        if not word.startswith("--config."):
            flags.error(f"unknown flag {word}")
    data = measures.DATA[args.data]
    suited = [name for name in METHODS if METHODS[name].of_tokens == data.of_tokens]
    steps = args.steps.split(",") if args.steps else data.steps
    return run(
        args.data,
        methods=args.methods.split(",") if args.methods else suited,
        steps=[int(number) for number in steps],
        runs=args.runs,
        num_samples=args.num_samples or data.num_samples,
        overrides=others,
    )


def run(data, *, methods, steps, runs, num_samples, overrides) -> int:
    """Makes the table; returns the exit status, 0 if nothing failed.

    Args:
      data: in `distillation_measures.DATA`.
      methods: names in `METHODS`.
      steps: of the students.
      runs: the folder of all runs.
      num_samples: of each measurement.
      overrides: words '--config.KEY=VALUE' for every student.

    Raises:
      ValueError: there is no such method, or it is not for such data.
    """
    about = measures.DATA[data]
    for name in methods:
        if name not in METHODS:
            raise ValueError(
                f"--methods: unknown method '{name}'{registry.nearest(name, METHODS)}"
            )
        if METHODS[name].of_tokens != about.of_tokens:
            kinds = ("numbers", "tokens")
            raise ValueError(
                f"--methods: '{name}' is for {kinds[METHODS[name].of_tokens]}, and "
                f"{data} is {kinds[about.of_tokens]}."
            )
    out = runs / f"distillation_{data}"
    out.mkdir(parents=True, exist_ok=True)
    table = Table(data, num_samples, out)
    for name, config in about.runs.items():
        words = [f"--workdir={runs / name}"]
        if not (runs / name / "config.json").is_file():
            words = [f"--config={ROOT}/configs/{config}.py", *words]
        elif finished(runs / name):
            continue
        trained(words, out / f"{name}.log")
    teacher = runs / next(iter(about.runs))
    for name, block in {**about.samplers, **about.colder}.items():
        for number in (*steps, *([LONG] if name in about.samplers else [])):
            table.add(name, number, teacher, {**block, "num_steps": number})
    failed = False
    for name in methods:
        for number in steps:
            if METHODS[name].steps is None or number in METHODS[name].steps:
                failed |= not student(table, name, number, runs, overrides)
        table.write(methods)
    table.write(methods)
    print((out / "table.md").read_text())
    print(f"written: {out / 'table.md'}, table.json, table.png")
    return int(failed)


def student(table, name: str, steps: int, runs: pathlib.Path, overrides) -> bool:
    """Trains a student where that is left to do, and measures it; returns success."""
    variant = measures.DATA[table.data].variant
    place = f"{ROOT}/configs/distillation/{name}.py" + (
        f":{variant}" if variant else ""
    )
    config = config_lib.load(place)
    # Where training does not know the number of steps, one student takes any.
    is_trained_for = "num_steps" in config.objective
    folder = table.folder / (f"{name}_{steps}" if is_trained_for else name)
    # The teachers that the config names, in the folder of these runs.
    given = [
        f"teacher.{key}={runs / pathlib.PurePath(config.teacher[key]).name}"
        for key in ("run", "start")
        if config.teacher[key]
    ]
    given += [f"objective.num_steps={steps}"] if is_trained_for else []
    given += [word.removeprefix("--config.") for word in overrides]
    try:
        inherit.override(config, given, folder)
        resolved = config_lib.resolve(config)
        workdir.check(folder, resolved, "auto")
        if not finished(folder):
            words = [f"--config={place}", f"--workdir={folder}"]
            words += [*(f"--config.{word}" for word in given)]
            trained(words, table.folder / f"{folder.name}.log")
        block = {**resolved["sampler"], "num_steps": steps}
        table.add(name, steps, folder, block)
    except _ERRORS as error:
        print(f"{name}, {steps} steps: failed: {error}", flush=True)
        return False
    return True


def finished(folder: pathlib.Path) -> bool:
    """Whether a run made its last step, and what follows it."""
    path = folder / "result.json"
    if not path.is_file():
        return False
    num_steps = workdir.read_config(folder)["train"]["num_steps"]
    return json.loads(path.read_text())["step"] == num_steps


def trained(words: list[str], log: pathlib.Path) -> None:
    """Runs the program, with what it prints in a file; ends this one on SIGTERM."""
    print(f"training: diffusionlab {' '.join(words)}", flush=True)
    since = time.perf_counter()
    with log.open("a") as file, contextlib.redirect_stdout(file):
        status = main.run(words)
    if status != train.DONE:
        sys.exit(status)
    print(f"  done in {time.perf_counter() - since:.0f} s", flush=True)


def digest_of(run: pathlib.Path, step: int) -> str:
    """Returns 64 hex digits of config and checkpoint: a run made anew has others."""
    folder = run / "checkpoints" / str(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = hashlib.sha256((run / "config.json").read_bytes())
    for file in files:
        found.update(f"{file.relative_to(folder)}".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


class Table:
    """The measurements, each also in a file of its own: none is made twice.

    Args:
      data: in `distillation_measures.DATA`.
      num_samples: of each measurement.
      folder: of the table, in that of all runs.
    """

    def __init__(self, data: str, num_samples: int, folder: pathlib.Path):
        self.data, self.folder = data, folder
        self._num_samples = num_samples
        self._rows: list[dict] = []
        self._real: dict[str, float] = {}

    def add(self, method: str, steps: int, run: pathlib.Path, sampler: dict) -> None:
        """Measures the newest checkpoint of a run with a sampler."""
        stem = f"{method}_{steps}".replace(", ", "_").replace(" ", "_")
        path = self.folder / f"{stem}.json"
        checkpoints = Checkpoints(run)
        step = checkpoints.steps()[-1]
        config = config_lib.completed(workdir.read_config(run))
        sampler = registry.check("sampler", sampler, "sampler")
        asked = {"run": str(run), "step": step, "sampler": sampler}
        asked |= {"num_samples": self._num_samples, "digest": digest_of(run, step)}
        if self.data == "text":
            reference = self.folder.parent / "language_model"
            asked["reference"] = digest_of(
                reference, workdir.saved_steps(reference)[-1]
            )
        found = json.loads(path.read_text()) if path.is_file() else {}
        if found.get("asked") != asked:
            config |= {
                "sampler": sampler,
                "evals": measures.evals_of(
                    self.data, self._num_samples, self.folder.parent
                ),
                "logging": config["logging"]
                | {"num_samples": measures.DATA[self.data].batch_size},
            }
            numbers, real = self._measured(config, checkpoints, step, stem)
            rows = writers.read_rows(run / writers.METRICS_FILE)
            size = config["data"]["batch_size"]
            if config["objective"]["name"] in METHODS:
                numbers["seconds"] = measures.seconds_of(rows, size)
            found = {"asked": asked, "numbers": numbers, "real": real}
            workdir.write_json(path, found)
        self._real = found["real"]
        self._rows.append({"method": method, "steps": steps, **found})
        shown = (f"{k} {v:.4g}" for k, v in found["numbers"].items())
        print(f"{method}, {steps} steps: {', '.join(shown)}", flush=True)

    def _measured(self, config, checkpoints, step, stem):
        built = experiment.build(config)
        mesh = sharding.make_mesh(built.mesh)
        with jax.set_mesh(mesh):
            name = restore.default_ema(built)
            params = restore.restore(built, checkpoints, step, name, mesh)
            return measures.measure(
                self.data,
                built,
                mesh,
                params,
                step,
                self._num_samples,
                self.folder / "evaluations" / stem,
            )

    def write(self, methods: Sequence[str]) -> None:
        """Writes table.md, table.json and table.png of what there is so far.

        Args:
          methods: whose dashes and notes are explained.
        """
        reasons = {m: METHODS[m].why for m in methods if METHODS[m].why}
        said = {m: METHODS[m].notes.get(self.data, "") for m in methods}
        notes = {method: note for method, note in said.items() if note}
        rows = measures.with_teacher(self.data, self._rows)
        text = measures.markdown(self.data, rows, reasons, self._real, notes)
        (self.folder / "table.md").write_text(text, encoding="utf-8")
        record = {"rows": rows, "real": self._real}
        record |= {"reasons": reasons, "notes": notes}
        workdir.write_json(self.folder / "table.json", record)
        shown = measures.picture(self.data, self._rows, self._real)
        pictures.save_png(self.folder / "table.png", shown)


if __name__ == "__main__":
    sys.exit(main_program())
