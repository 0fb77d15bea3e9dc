"""The books of a sweep, and of a single run: which trials there are and what is known.

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import JournalStorage, journal
from optuna.trial import TrialState

from diffusionlab import workdir
from launch import definition
from launch.trial import Trial, identity

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
        names = self.asked["sweeps"]
        self._search: Callable | None = None
        if any(n.partition("_")[0] == "search" for n in names):
            _, self._search = definition.choose(self.asked["config"], names)
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

    def enqueue(self, points: Sequence[Mapping[str, Any]]) -> int:
        """Adds the points that are not there yet; returns how many."""
        known = {t.user_attrs.get("id") for t in self._frozen()}
        first, added = len(known - {None}), 0
        for point in points:
            name = identity(point)
            if name not in known:
                run = f"{first + added:04d}-{name}"
                self._study.enqueue_trial({}, {"id": name, "run": run, "point": point})
                added += 1
        return added

    def _frozen(self, *states: TrialState):
        return self._study.get_trials(deepcopy=False, states=states or None)

    @property
    def is_search(self) -> bool:
        return self._search is not None

    def is_cancelled(self) -> bool:
        """Whether nothing more is to be begun."""
        return (self.folder / _CANCELLED).is_file()

    def cancel(self) -> None:
        """Marks every trial that is open, and the sweep, as cancelled."""
        (self.folder / _CANCELLED).touch()
        for trial in self.trials():
            trial.record("cancelled", by="the user")

    def trials(self) -> list[Trial]:
        """Returns the trials that Optuna counts as running: to be seen to."""
        return [
            Trial(self.folder / "runs" / t.user_attrs["run"])
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
        if self._search is None:
            return waiting
        started = len({t.user_attrs.get("run") for t in self._frozen()} - {None})
        return max(waiting, self.asked["num_trials"] - started)

    def more(self, count: int) -> list[Trial]:
        """Begins up to `count` further trials; makes their directories."""
        if self.is_cancelled():
            return []
        self._drop_nameless()
        begun = []
        while len(begun) < count and self.waiting():
            found = self._ask()
            if found is None:
                break
            begun.append(found)
        return begun

    def _drop_nameless(self) -> None:
        """A driver was killed between asking for a trial and naming it."""
        for t in self._frozen(TrialState.RUNNING):
            if "run" not in t.user_attrs:
                self._study.tell(t.number, state=TrialState.FAIL)

    def _ask(self) -> Trial | None:
        for _ in range(_TRIES):
            asked = self._study.ask()
            attributes = asked.user_attrs
            point = attributes.get("point")
            if point is None:
                point = definition.check_point(self._search(asked), "search")
                point |= attributes.get("seed", self._first_seed())
                name = identity(point)
                if name in {t.user_attrs.get("id") for t in self._frozen()}:
                    # Optuna may suggest a point again, which would teach nothing.
                    self._study.tell(asked.number, state=TrialState.PRUNED)
                    self._study.sampler = self._sampler()
                    continue
                definition.check(
                    self.asked["config"], {**self.asked["overrides"], **point}
                )
                used = {t.user_attrs.get("run") for t in self._frozen()} - {None}
                run = f"{len(used):04d}-{name}"
                if "seed" not in attributes:
                    self._repeat(asked)
                asked.set_user_attr("id", name)
                asked.set_user_attr("point", point)
                asked.set_user_attr("run", run)
            return self._create(attributes.get("run") or run, point)
        raise SweepError(
            f"--sweep: {_TRIES} times in a row the search suggested a point that was "
            "there already; it has no more, lower --trials."
        )

    def _first_seed(self) -> dict[str, int]:
        many = self.asked["seeds"] > 1
        return {definition.SEED: self.asked["seed"]} if many else {}

    def _repeat(self, asked) -> None:
        """The same point with the other seeds: further trials of it."""
        for i in range(1, self.asked["seeds"]):
            seed = {definition.SEED: self.asked["seed"] + i}
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
        values = trial.values(self.asked["metric"]) if state == "done" else []
        if state == "done" and not values:
            remark = f"{trial.name}: has no finite {self.asked['metric']}"
        if values:
            self._study.tell(number, values[-1][1], skip_if_finished=True)
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
            known, frozen = trial.events(), self._of(trial)
            kinds = [e["event"] for e in known if e["event"] in ("cancelled", "retry")]
            failed = given_up and frozen.state == TrialState.FAIL
            if kinds[-1:] == ["cancelled"] or (failed and trial.result() is None):
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


def create(
    folder: pathlib.Path, asked: Mapping[str, Any], extend: bool = False
) -> Sweep:
    """Returns the sweep of a directory, new or going on.

    Args:
      folder: of the sweep.
      asked: the definition.
      extend: another definition adds its points to those that are there.

    Raises:
      SweepError: the directory holds something else, or another sweep.
    """
    path = folder / "sweep.json"
    if path.is_file():
        stored = workdir.read_json(path)
        fixed = ("config", "overrides", "sweeps", "seeds", "seed", "metric", "goal")
        for key in fixed:
            if stored[key] != asked[key] and not extend:
                raise SweepError(
                    f"'{folder}' is of another sweep ({key}: {stored[key]!r}, now "
                    f"{asked[key]!r}); give another --name, or --extend."
                )
    elif folder.is_dir() and any(p.name != "driver" for p in folder.iterdir()):
        raise SweepError(f"'{folder}' is not empty and holds no sweep; give another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_json(path, asked)
    except OSError as error:
        raise SweepError(
            f"'{folder}' cannot be a sweep's directory: {error.strerror}."
        ) from None
    return Sweep(folder)


class Single:
    """The books of one run: its directory is the trial's own.

    Args:
      folder: the run directory, with a trial.json.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self._trial = Trial(self.folder)
        self.asked = self._trial.asked()
        self.max_parallel, self.max_failures = 1, self.asked["max_failures"]
        self._closed = False

    def is_cancelled(self) -> bool:
        kinds = [e["event"] for e in self._trial.events()]
        return [k for k in kinds if k in ("cancelled", "retry")][-1:] == ["cancelled"]

    def cancel(self) -> None:
        if self._trial.result() is None:
            self._trial.record("cancelled", by="the user")

    is_search = False

    def trials(self) -> list[Trial]:
        return [] if self._closed else [self._trial]

    def everything(self) -> list[Trial]:
        return [self._trial]

    def waiting(self) -> int:
        return 0

    def more(self, count: int) -> list[Trial]:
        return []

    def close(self, trial: Trial, state: str) -> str:
        self._closed = True
        return ""

    def is_hopeless(self, trial: Trial) -> bool:
        return False

    def retry(self, given_up: bool) -> list[str]:
        """A run that the user starts again has its whole allowance again."""
        events = self._trial.events()
        if events and events[-1]["event"] != "retry" and self._trial.result() is None:
            self._trial.record("retry")
        return []

    def is_complete(self) -> bool:
        return self._closed


def open_books(folder: pathlib.Path) -> Sweep | Single:
    """Returns the books of a directory of the launcher.

    Raises:
      FileNotFoundError: it is none.
    """
    return Sweep(folder) if definition.is_sweep(folder) else Single(folder)
