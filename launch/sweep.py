"""The books of a sweep: which trials there are and what is known of them.

sweep.json       the definition: config, overrides, sweeps, engine, resources
optuna.journal   trials as Optuna knows them: values, pruning, what a search asked
runs/0003-ab12cd34/   the run directory of trial 3; see `launch.trial`
jobs/            of the engine: logs
driver/          locked while a driver is at work
"""

from __future__ import annotations

import hashlib
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import JournalStorage, journal
from optuna.trial import TrialState

from diffusionlab import workdir
from launch import definition, table
from launch.trial import Trial, identity, is_cancelled, mark_cancelled

PRUNERS = {
    "": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
    "hyperband": optuna.pruners.HyperbandPruner,
}
_OPEN = (TrialState.RUNNING, TrialState.WAITING)
_TRIES = 100
_CANCELLED = "cancelled"


class SweepError(RuntimeError):
    """A directory cannot be used for this sweep; the message says why."""


class Sweep:
    """A directory of trials, and Optuna's journal of them.

    Args:
      folder: of the sweep; `create` makes one.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self.asked = definition.read_sweep(self.folder)
        self.max_parallel = self.asked["max_parallel"]
        self.max_failures = self.asked["max_failures"]
        self.is_search = bool(self.asked["search"])
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings(
            "ignore", category=optuna.exceptions.ExperimentalWarning
        )
        backend = journal.JournalFileBackend(str(self.folder / "optuna.journal"))
        self._study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name="sweep",
            load_if_exists=True,
            direction="maximize" if self.asked["goal"] == "max" else "minimize",
            pruner=PRUNERS[self.asked["prune"]](),
        )
        self._study.sampler = self._sampler()

    def _sampler(self):
        # A seed of its own for every trial: a fixed one would repeat its first
        # suggestions in a driver that was started again.
        count = len(self._study.get_trials(deepcopy=False))
        text = f"{self.asked['seed']} {count}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def enqueue(self) -> int:
        """Adds the points that are not there yet; returns how many.

        Only while no other driver is at work here. One that was killed in the middle
        of this is taken up.
        """
        known = {t.user_attrs.get("id") for t in self._frozen()} - {None}
        added = 0
        for point in self.asked["points"]:
            name = identity(point)
            if name not in known:
                run = f"{len(known):04d}-{name}"
                self._study.enqueue_trial({}, {"id": name, "run": run, "point": point})
                known.add(name)
                added += 1
        return added

    def _frozen(self, *states: TrialState):
        return self._study.get_trials(deepcopy=False, states=states or None)

    def is_cancelled(self) -> bool:
        """Whether nothing more is to be begun."""
        return (self.folder / _CANCELLED).is_file()

    def cancel(self) -> None:
        """Marks the sweep, and every trial that is open, as cancelled."""
        (self.folder / _CANCELLED).touch()
        for trial in self.trials():
            mark_cancelled(trial)

    def trials(self) -> list[Trial]:
        """Returns the trials that Optuna counts as running: to be seen to."""
        return [
            # A driver may have been killed before it had made the directory.
            self._create(t.user_attrs["run"], t.user_attrs["point"])
            for t in self._frozen(TrialState.RUNNING)
            if "run" in t.user_attrs
        ]

    def everything(self) -> list[Trial]:
        """Returns every trial that has a directory, by number."""
        folders = (self.folder / "runs").glob("*/trial.json")
        return [Trial(path.parent) for path in sorted(folders)]

    def waiting(self) -> int:
        """Returns how many trials have not begun, as far as is known."""
        waiting = len(self._frozen(TrialState.WAITING))
        if not self.is_search or "exhausted" in self._study.user_attrs:
            return waiting
        found = [t.user_attrs for t in self._frozen() if "searched" in t.user_attrs]
        return max(waiting, self.asked["num_trials"] - len({a["run"] for a in found}))

    def points_to_begin(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Returns name and point of each trial that waits and has them."""
        waiting = [t.user_attrs for t in self._frozen(TrialState.WAITING)]
        return [(a["run"], a["point"]) for a in waiting if "run" in a]

    def more(self, count: int) -> list[Trial]:
        """Begins up to `count` further trials; makes their directories.

        Raises:
          SweepError, ValueError, TypeError: the search gave a point that cannot be.
        """
        for t in self._frozen(TrialState.RUNNING):
            if "run" not in t.user_attrs:
                # A driver was killed between asking for a trial and naming it.
                self._study.tell(t.number, state=TrialState.FAIL)
        begun: list[Trial] = []
        while len(begun) < count and self.waiting() and not self.is_cancelled():
            found = self._ask()
            if found is None:
                break
            begun.append(found)
        return begun

    def _ask(self) -> Trial | None:
        """Begins one trial; None: the search has no other point."""
        for _ in range(_TRIES):
            asked = self._study.ask()
            if "run" in asked.user_attrs:
                return self._create(asked.user_attrs["run"], asked.user_attrs["point"])
            try:
                point = self._suggested(asked)
            except BaseException:
                self._study.tell(asked.number, state=TrialState.FAIL)
                raise
            name = identity(point)
            known = {t.user_attrs.get("id") for t in self._frozen()} - {None}
            if name in known:
                # Optuna may suggest a point again, which would teach nothing.
                self._study.tell(asked.number, state=TrialState.PRUNED)
                self._study.sampler = self._sampler()
                continue
            if "seed" not in asked.user_attrs:
                self._repeat(asked)
            run = f"{len(known):04d}-{name}"
            attributes = {"searched": True, "point": point, "id": name, "run": run}
            for key, value in attributes.items():
                asked.set_user_attr(key, value)
            return self._create(run, point)
        self._study.set_user_attr("exhausted", True)
        return None

    def _suggested(self, asked) -> Mapping[str, Any]:
        """The point of a search, checked, where the command was given."""
        seed = asked.user_attrs.get("seed", self.asked["seed"])
        with definition.there(self.asked):
            config, name = self.asked["config"], self.asked["search"]
            _, search = definition.choose(config, [name])
            point = definition.check_point(search(asked), name)
            point = {definition.SEED: seed, **point}
            definition.check(config, {**self.asked["overrides"], **point})
        return point

    def _repeat(self, asked) -> None:
        """The same point with the other seeds: further trials of it."""
        for i in range(1, self.asked["seeds"]):
            seed = self.asked["seed"] + i
            self._study.enqueue_trial(asked.params, {"seed": seed})

    def _create(self, run: str, point: Mapping[str, Any]) -> Trial:
        trial = Trial(self.folder / "runs" / run)
        number = int(run.partition("-")[0])
        trial.create(trial_of(self.folder, self.asked, number, point))
        return trial

    def _of(self, trial: Trial):
        """The newest of Optuna's trials for a directory: it may have been retried."""
        return [t for t in self._frozen() if t.user_attrs.get("run") == trial.name][-1]

    def close(self, trial: Trial, state: str) -> str:
        """Tells Optuna how a trial ended; returns a remark for the user, or ''.

        Args:
          trial: of this sweep.
          state: 'done', 'pruned' or 'given up'.
        """
        if self.asked["prune"] and self._of(trial).state == TrialState.RUNNING:
            self._report(trial)
        number, remark = self._of(trial).number, ""
        record = table.record(trial, {}, self.max_failures)
        value = record.value(self.asked["metric"]) if state == "done" else None
        if state == "done" and value is None:
            remark = f"{trial.name}: has no finite {self.asked['metric']}"
        if value is not None:
            self._study.tell(number, value, skip_if_finished=True)
        else:
            ends = {"pruned": TrialState.PRUNED}
            end = ends.get(state, TrialState.FAIL)
            self._study.tell(number, state=end, skip_if_finished=True)
        return remark

    def is_hopeless(self, trial: Trial) -> bool:
        """Whether the pruner would end a trial, by its values so far."""
        return bool(self.asked["prune"]) and self._report(trial).should_prune()

    def _report(self, trial: Trial):
        """Tells the pruner the values of a trial that it has not been told."""
        frozen = self._of(trial)
        live = optuna.trial.Trial(self._study, frozen._trial_id)
        for step, value in trial.values(self.asked["metric"]):
            if step not in frozen.intermediate_values:
                live.report(value, step)
        return live

    def retry(self, given_up: bool) -> list[str]:
        """Opens cancelled trials again, and with `given_up` those too."""
        (self.folder / _CANCELLED).unlink(missing_ok=True)
        opened = []
        for trial in self.everything():
            if trial.result() is not None:
                continue
            frozen = self._of(trial)
            failed = given_up and frozen.state == TrialState.FAIL
            if is_cancelled(trial) or failed:
                trial.record("retry")
                opened.append(trial.name)
                if frozen.state not in _OPEN:
                    self._study.enqueue_trial(frozen.params, frozen.user_attrs)
        return opened

    def is_complete(self) -> bool:
        """Whether nothing is left to do, as far as Optuna knows."""
        return not self.waiting() and not self.trials()


def trial_of(
    folder: pathlib.Path, asked: Mapping[str, Any], number: int, point: Mapping
) -> dict[str, Any]:
    """Returns what trial.json of a trial of a sweep says.

    Args:
      folder: of the sweep.
      asked: its definition.
      number: of the trial.
      point: what the trial sets besides the sweep's own overrides.
    """
    shared = {key: asked[key] for key in ("config", "overrides", "flags", "cwd")}
    return {"number": number, "sweep": str(folder), "point": point, **shared}


def check(folder: pathlib.Path, asked: Mapping[str, Any], extend: bool) -> None:
    """Checks that a sweep may start or go on in a directory; writes nothing.

    Raises:
      SweepError: the directory holds something else, or another sweep.
    """
    if definition.is_sweep(folder):
        stored = definition.read_sweep(folder)
        fixed = ["config", "overrides", "seed", "metric", "goal", "prune", "flags"]
        if not extend:
            fixed += ["sweeps", "seeds", "num_trials"]
        for key in fixed:
            if stored[key] != asked[key]:
                mend = "undo that" if extend else "undo that, or --extend"
                if key not in ("sweeps", "seeds", "num_trials"):
                    mend = "undo that"
                raise SweepError(
                    f"'{folder}' is of another sweep ({key}: {stored[key]!r}, now "
                    f"{asked[key]!r}); {mend}, or give another --name."
                )
        return
    try:
        found = list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise _unusable(folder, error) from None
    # What a start that was killed left behind is no obstacle.
    if any(p.name != "driver" and not p.name.startswith(".") for p in found):
        raise SweepError(f"'{folder}' is not empty and holds no sweep; give another.")


def _unusable(folder: pathlib.Path, error: OSError) -> SweepError:
    return SweepError(f"'{folder}' cannot be a sweep's directory: {error.strerror}.")


def create(folder: pathlib.Path, asked: Mapping[str, Any]) -> Sweep:
    """Returns the sweep of a directory that `check` has admitted, new or going on.

    An extended one has the points of both definitions.
    """
    merged = dict(asked)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if definition.is_sweep(folder):
            stored = definition.read_sweep(folder)
            points = [*stored["points"], *asked["points"]]
            merged["points"] = definition.unique(points)
            merged["search"] = asked["search"] or stored["search"]
            merged["num_trials"] = max(asked["num_trials"], stored["num_trials"])
        workdir.write_json(folder / "sweep.json", merged)
    except OSError as error:
        raise _unusable(folder, error) from None
    sweep = Sweep(folder)
    sweep.enqueue()
    return sweep
