"""What happens beside training at known steps: pictures, evaluators, a profile."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping

import jax

from diffusionlab import (
    evaluate,
    multihost,
    pictures,
    report,
    restore,
    strip,
    texts,
    workdir,
)
from diffusionlab import writers as writers_lib
from diffusionlab.experiment import Experiment
from diffusionlab.state import TrainState


@contextlib.contextmanager
def saving_first(
    save: Callable[[int], None], step: int, is_due: bool, meet: Callable[[str], None]
) -> Iterator[None]:
    """Calls `save(step)`, if due, before an error goes on, which stays the one told.

    Of several processes all save, or none: where only some have an error they wait for
    the others in `meet`, until that raises, and none of them gets to the save.
    """
    try:
        yield
    except Exception as error:
        if not is_due:
            raise
        if jax.process_count() > 1:
            # Another one that gives up its wait may end this process before it raises.
            who = f"process {jax.process_index()}/{jax.process_count()}"
            print(f"{who}: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            meet(f"an error at step {step}")
            save(step)
        raise


class Hooks:
    """Runs what is due.

    Args:
      experiment: says what is due when.
      mesh: where.
      folder: the run directory.
      writers: take the results.
      say: prints a line that stays.
      judge: `judge(step, labels, numbers)` is told what evaluators found.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh,
        folder: pathlib.Path,
        writers,
        say: Callable[[str], None],
        judge: Callable[[int, Collection[str], Mapping[str, float]], None],
    ):
        self._experiment, self._folder = experiment, folder
        self._writers, self._say, self._judge = writers, say, judge
        self._ema = restore.default_ema(experiment)
        self._evaluation = evaluate.Evaluation(experiment, mesh, folder)
        self._profiling = False

    def due(self, step: int, state: TrainState) -> None:
        """Runs what is due on the state after `step` steps."""
        settings = self._experiment.logging
        if settings.samples_every and step % settings.samples_every == 0:
            self._picture(step, state)
        evals = self._experiment.evals
        labels = [n for n, e in evals.items() if e.every and step % e.every == 0]
        self._evaluate(labels, step, state)

    def finish(self, step: int, state: TrainState) -> None:
        """After the last step: samples, every evaluator, the report, result.json.

        result.json is the last act: a run that has one for this step is finished, and
        nothing is done again.
        """
        result = self._folder / "result.json"
        if result.is_file() and json.loads(result.read_text())["step"] == step:
            self._say(f"this run is finished: {step} steps, see {result}")
            return
        if self._experiment.logging.samples_every:
            self._picture(step, state)
        numbers = self._evaluate(list(self._experiment.evals), step, state)
        self._writers.flush()
        if multihost.is_main():
            written = report.write_report(self._folder)
            workdir.write_json(result, {"step": step, "numbers": numbers})
            self._say(_made(self._folder, written))

    def _params(self, state: TrainState):
        return restore.of_state(self._experiment, state, self._ema)

    def _picture(self, step: int, state: TrainState) -> None:
        num = self._experiment.logging.num_samples
        x, labels = self._evaluation.draw_examples(self._params(state), num)
        if not multihost.is_main():
            return
        spec, folder = self._experiment.spec, self._folder / "samples"
        known = labels if spec.num_classes else None
        if texts.shows_text(spec):
            decode = functools.partial(texts.of_tokens, self._experiment.train_source)
            said = texts.blocks(decode(x), known)
            texts.save(folder / f"step_{step:08d}.txt", said)
            self._writers.text(step, "samples", said)
            strip.add_tokens(folder, step, x, decode)
        else:
            picture = pictures.of_examples(x, known)
            pictures.save_png(folder / f"step_{step:08d}.png", picture)
            strip.add(folder, step, x, known)
            self._writers.image(step, "samples", picture)

    def _evaluate(self, labels, step: int, state: TrainState) -> dict[str, float]:
        if not labels:
            return {}
        numbers, intervals = self._evaluation.run(
            self._params(state), step, labels, self._ema
        )
        self._say(f"evaluation at step {step}:\n{evaluate.table(numbers, intervals)}")
        # Before the row: what is refused here is evaluated again, and a row stays.
        self._judge(step, labels, numbers)
        if not self._recorded(step):
            self._writers.scalars(step, numbers)
        return numbers

    def _recorded(self, step: int) -> bool:
        """Whether a start that was killed in `finish` wrote this row already."""
        self._writers.flush()
        rows = writers_lib.read_rows(self._folder / writers_lib.METRICS_FILE)
        return any(
            row["step"] == step and any(name.startswith("eval/") for name in row)
            for row in rows
        )

    def profile(self, step: int, state: TrainState) -> None:
        """Starts or stops the profiler before step `step`, as the window says."""
        settings = self._experiment.logging
        first, end = settings.profile_from, settings.profile_from
        end += settings.profile_steps
        if first <= step < end and not self._profiling:
            jax.profiler.start_trace(str(self._folder / "profile"))
            self._profiling = True
        elif self._profiling and step >= end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Stops the profiler where training ends inside its window."""
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False
            self._say(f"profile written to {self._folder / 'profile'}")


def _made(folder: pathlib.Path, written: pathlib.Path) -> str:
    """What the run made, and where."""
    lines = [f"done; look at {written}"]
    lines += [f"  {path}" for path in sorted((folder / "evals").glob("*.png"))]
    samples = folder / "samples"
    for kind in ("png", "txt"):
        lines += [f"  {path}" for path in sorted(samples.glob(f"step_*.{kind}"))[-1:]]
        lines += [f"  {path}" for path in samples.glob(f"strip.{kind}")]
    lines += [
        f"  {folder / name}" for name in ("metrics.jsonl", "evals", "checkpoints")
    ]
    return "\n".join(lines)
