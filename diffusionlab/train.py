"""The training loop: restore, step, log, save. It knows no method.

In each turn, in this order: what is due on the state before the step (save, pictures,
evaluation), the batch, the step, and at a log point the metrics since the last one.
Between two log points the host waits for nothing on the device.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusionlab import (
    STARTED,
    compiled,
    hooks,
    machine,
    multihost,
    pairs,
    progress,
    settings,
    sharding,
    teachers,
    train_step,
    workdir,
    writers,
)
from diffusionlab import config as config_lib
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints, DamagedError
from diffusionlab.data import pipeline
from diffusionlab.experiment import Experiment
from diffusionlab.preemption import PREEMPTED, Preemption
from diffusionlab.types import Source

DONE = 0
"""Exit status of a run that is finished; see `preemption.PREEMPTED` for the other."""


class NonFiniteError(RuntimeError):
    """A metric was not finite; names the first step and the metric."""


def train(
    config: Mapping[str, Any],
    folder: pathlib.Path,
    *,
    resume: str = "auto",
    asked: Mapping[str, Any] | None = None,
) -> int:
    """Trains the run of `config` in `folder`, from where it stands.

    Args:
      config: resolved.
      folder: the run directory; made if it is not there.
      resume: 'auto' goes on from the newest checkpoint, 'never' refuses to, and
        'newest_whole' sets damaged checkpoints aside and goes on from one that can be
        read.
      asked: config file and overrides of this start, for the record.

    Returns:
      `DONE`, or `PREEMPTED` after SIGTERM.

    Raises:
      ValueError, FileNotFoundError: the config cannot be built.
      WorkdirError: the folder belongs to another run, or is being trained in.
      CheckpointError: a checkpoint is damaged or could not be written.
      NonFiniteError: training diverged.
    """
    workdir.check(folder, config, resume)
    if is_first := not workdir.saved_steps(folder):
        teachers.check_start(config)
    experiment = experiment_lib.build(config)
    mesh = sharding.make_mesh(experiment.mesh)
    _check_batch(experiment, mesh)
    settings.check_best(experiment.checkpoint, experiment.evals)
    pairs.check(experiment)
    # Everything is built before the directory is claimed: a mistake leaves no trace.
    with jax.set_mesh(mesh):
        frozen, start = teachers.load(experiment, mesh, folder), None
        if is_first:
            start = teachers.starting(experiment, mesh, frozen, folder)
        steps = compiled.Steps(experiment, mesh, frozen)
        on_pairs, data = pairs.number(experiment.objective) > 0, None
        if not on_pairs:
            data = make_batches(experiment, mesh, experiment.train_source)
    timeout = experiment.checkpoint.barrier_timeout
    # No process may look at the directory while another is claiming it.
    multihost.barrier("check the run directory", timeout)
    with contextlib.ExitStack() as held, jax.set_mesh(mesh):

        def claim():
            held.enter_context(workdir.lock(folder))
            # Another start may have come and gone since we looked.
            workdir.check(folder, config, resume)
            workdir.claim(folder, config, asked or {}, machine.environment())

        multihost.on_main("claim the run directory", claim, timeout)
        teachers.keep(experiment, frozen, folder)
        if on_pairs:
            # What is drawn is kept, part by part.
            Preemption(timeout).nothing_to_save()
            source = pairs.prepare(experiment, mesh, frozen, folder)
            data = make_batches(experiment, mesh, source)
        return Loop(experiment, mesh, folder, resume, steps, data, start).run()


def _check_batch(experiment: Experiment, mesh) -> None:
    shards = sharding.batch_shards(mesh)
    micro = experiment.data.batch_size // experiment.train.micro_batches
    if micro % shards:
        raise ValueError(
            f"config.data.batch_size: a micro-batch has {micro} examples, which the "
            f"{shards} devices along 'data' and 'fsdp' do not divide."
        )


def make_batches(experiment: Experiment, mesh, source: Source) -> pipeline.Batches:
    """Returns this process's part of the batches of a source."""
    size = experiment.data.batch_size
    return pipeline.Batches(
        source,
        batch_size=size,
        seed=experiment.seed,
        augments=experiment.augment,
        rows=pipeline.rows_of(sharding.batch_sharding(mesh), size),
        num_threads=experiment.data.num_threads,
        prefetch=experiment.data.prefetch,
    )


class Loop:
    """One start of a run.

    Args:
      experiment, mesh, folder, resume: as in `train`.
      steps: the step of each phase.
      data: this process's batches.
      start: see `state.init`.
    """

    def __init__(self, experiment, mesh, folder, resume, steps, data, start=None):
        self.experiment, self.mesh, self.folder = experiment, mesh, folder
        self.preemption = Preemption(experiment.checkpoint.barrier_timeout)
        self.printer = progress.Printer() if multihost.is_main() else None
        self.steps, self.data = steps, data
        self.say(self._placement_table())
        self.checkpoints = Checkpoints(folder, experiment.checkpoint)
        self.hooks_done = True
        self.start, self.state, self.gathered = self._begin(resume, start)
        self.checkpoints.best.look(self.start)
        self.writers = writers.open_writers(
            folder,
            step=self.start,
            process_index=jax.process_index(),
            tensorboard=experiment.logging.tensorboard,
            wandb=experiment.logging.wandb,
            config=experiment.config,
        )
        self.writers.text(0, "config", config_lib.to_text(experiment.config))
        judge = self.checkpoints.judge
        self.hooks = hooks.Hooks(
            experiment, mesh, folder, self.writers, self.say, judge
        )
        self.saved = self.start if self.checkpoints.steps() else None

    def say(self, text: str) -> None:
        if self.printer:
            self.printer.say(text)

    def _placement_table(self) -> str:
        places = state_lib.placements(self.experiment, self.mesh)
        params = self.steps.state.params
        return sharding.table({r: (params[r], places[r]) for r in params}, self.mesh)

    def _begin(self, resume: str, start):
        """Restores the newest checkpoint, or initialises; never both."""
        found = self.checkpoints.steps()
        timeout = self.experiment.checkpoint.barrier_timeout
        while found:
            try:
                with multihost.together(f"restoring step {found[-1]}", timeout):
                    state, gathered, data, meta = self.checkpoints.restore(
                        found[-1], self.steps.state, self.steps.abstract_gathered()
                    )
            except DamagedError as error:
                if resume != "newest_whole" or len(found) == 1:
                    raise
                aside = self.checkpoints.set_aside(found.pop())
                self.say(f"{error}\nSet aside as {aside}.")
                continue
            self.data.set_state(data)
            self.hooks_done = meta["hooks_done"]
            self.say(f"resumed from step {found[-1]} of {self.checkpoints.folder}")
            return found[-1], state, gathered
        if (self.folder / writers.METRICS_FILE).is_file():
            self.say("no checkpoint yet: starting at step 0")
        state = state_lib.init(self.experiment, self.mesh, start)
        return 0, state, self.steps.empty()

    def run(self) -> int:
        """Trains to the last step; returns the exit status."""
        parts = (self.hooks, self.writers, self.data, self.checkpoints)
        closing = [part.close for part in parts]
        try:
            status = self._run()
        except BaseException:
            # A save under way may still end well; the first error is the one to tell.
            for close in closing:
                with contextlib.suppress(Exception):
                    close()
            raise
        for close in closing:
            close()
        return status

    def _run(self) -> int:
        last = self.experiment.train.num_steps
        if self.start < last:
            self.clock = self._clock(last)
        if not self.advance(self.start, last):
            return PREEMPTED
        self._save(last, hooks_done=True)
        self._wait_for_save()
        self.preemption.nothing_to_save()
        self.hooks.finish(last, self.state)
        return DONE

    def advance(self, first: int, last: int) -> bool:
        """Runs steps `first` to `last` - 1; returns whether SIGTERM let it finish."""
        for step in range(first, last):
            if self.preemption.reached(step):
                done = step == self.start and self.hooks_done
                self._save_now(step, done, "SIGTERM: ")
                return False
            if step != self.start or not self.hooks_done:
                self._due(step)
            self.hooks.profile(step, self.state)
            waiting_since = time.perf_counter()
            local = next(self.data)
            self.clock.waited(time.perf_counter() - waiting_since)
            batch = self._global(local)
            self.state = self.steps(step, self.state, self.gathered, batch)
            if step == self.start:
                self._say_first_step()
            if (step + 1) % self.experiment.logging.every == 0 or step + 1 == last:
                self._log(step + 1)
        return True

    def _say_first_step(self) -> None:
        jax.block_until_ready(self.state.step)
        seconds = time.monotonic() - STARTED
        self.say(f"first step done {seconds:.1f} s after the start of the program")
        self.clock.stretch(self.start + 1)

    def _due(self, step: int) -> None:
        """Hooks before the save: a checkpoint then stands for all rows up to it."""
        since = time.perf_counter()
        is_saved = step % self.experiment.checkpoint.every == 0
        if is_saved:
            # Apart from the hooks: after a row that was lost nothing must be saved.
            self.writers.flush()
        meet = self.checkpoints.meet
        with hooks.saving_first(self._save_now, step, is_saved, meet):
            self.hooks.due(step, self.state)
        self.clock.aside(time.perf_counter() - since)
        if is_saved:
            self._save(step, hooks_done=True)

    def _save_now(self, step: int, hooks_done: bool = False, why: str = "") -> None:
        self._save(step, hooks_done)
        self._wait_for_save()
        self.say(f"{why}saved step {step}; start again to go on")

    def _global(self, local: Mapping[str, np.ndarray]):
        where = sharding.batch_sharding(self.mesh)
        size = self.experiment.data.batch_size
        return {
            name: jax.make_array_from_process_local_data(
                where, array, (size, *array.shape[1:])
            )
            for name, array in local.items()
        }

    def _clock(self, last: int) -> progress.Clock:
        work = compiled.flops_of_step(self.experiment, self.steps)
        devices = jax.device_count()
        rates = {
            "mfu": machine.matrix_rate(self.experiment.precision.compute) * devices
        }
        if sheet := machine.datasheet_rate():
            rates["mfu_datasheet"] = sheet * devices
        self.steps.compile()
        self.say(
            f"{work:.3g} FLOPs per step; this device multiplies matrices at "
            f"{rates['mfu'] / devices / 1e9:,.0f} GFLOP/s"
        )
        size = self.experiment.data.batch_size
        return progress.Clock(self.start, last, size, work, rates)

    def _log(self, step: int) -> None:
        """Writes the means since the last row, and starts the next."""
        timeout = self.experiment.checkpoint.barrier_timeout
        with multihost.together(f"the metrics of step {step}", timeout):
            found = jax.device_get(self.gathered)
        self._check_finite(found, step)
        self.gathered = self.steps.empty()
        row = {}
        for gathered in found.values():
            for name, (total, count) in gathered["sums"].items():
                if np.any(count):
                    row[f"train/{name}"] = _mean(total, count)
        figures = self.clock.stretch(step)
        self.writers.scalars(step, row | figures)
        if self.printer:
            every, last = self.experiment.checkpoint.every, self.clock.num_steps
            next_save = min((step // every + 1) * every, last)
            loss = row.get("train/loss")
            self.printer.progress(progress.line(step, last, loss, figures, next_save))

    def _check_finite(self, found: Mapping[str, Any], step: int) -> None:
        bad = [
            (int(first), f"train/{name}")
            for gathered in found.values()
            for name, first in gathered["nonfinite"].items()
            if first != train_step.NEVER
        ]
        if bad:
            first, name = min(bad)
            names = ", ".join(sorted({n for s, n in bad if s == first}))
            self._wait_for_save()
            kept = self.checkpoints.steps()
            raise NonFiniteError(
                f"step {first}: {names} not finite (found at step {step}). The "
                f"checkpoints before it stay: {kept or 'none'}. Lower the learning "
                f"rate config.optim, or look at step {first}'s batch."
            )

    def _wait_for_save(self) -> None:
        timeout = self.experiment.checkpoint.barrier_timeout
        with multihost.together(f"the checkpoint of step {self.saved}", timeout):
            self.checkpoints.wait()

    def _save(self, step: int, hooks_done: bool) -> None:
        """Saves the state after `step` steps, unless that is on the disk already.

        Args:
          step: finished steps.
          hooks_done: what is due at this step is done, and a resume skips it.
        """
        if step == self.saved:
            return
        # A resume drops rows after the checkpoint, and repeats none before it.
        self.writers.flush()
        timeout = self.experiment.checkpoint.barrier_timeout
        with multihost.together(f"saving step {step}", timeout):
            self._check_finite(jax.device_get(self.gathered), step)
            self.checkpoints.save(
                step,
                self.state,
                self.gathered,
                self.data.get_state(),
                {
                    "step": step,
                    "hooks_done": hooks_done,
                    "process_count": jax.process_count(),
                    "versions": machine.versions(),
                },
            )
        self.saved = step


def _mean(total, count) -> float | list[float]:
    """Bins that nothing fell into have no mean: NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.asarray(total, np.float64) / count).tolist()
