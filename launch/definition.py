"""What a sweep is of: functions in the config file that give overrides.

  def sweep_rate():                 # --sweep=rate; a grid
      for value in (1e-3, 3e-3):
          yield {"config.optim.denoiser.learning_rate.value": value}

  def search(trial):                # --sweep=search; Optuna chooses
      rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
      return {"config.optim.denoiser.learning_rate.value": rate}

`--sweep=rate,width` is the product of `sweep_rate` and `sweep_width`; the function
`sweep` is what is meant without a name. A point is a dictionary from a key of the
config to its value; each is checked against the config before anything is submitted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffusionlab import config as config_lib
from diffusionlab import inherit, registry, workdir

Point = dict[str, Any]

TEACHER, SEED = "config.teacher", "config.seed"
_MANY = 100_000


def functions(config: str) -> dict[str, Callable]:
    """Returns the sweeps and searches of a config file by name, 'sweep' among them.

    Raises:
      FileNotFoundError, ValueError: as `config.load`.
    """
    module, _ = config_lib.load_module(config)
    found = {}
    for name, value in vars(module).items():
        kind, _, rest = name.partition("_")
        if kind in ("sweep", "search") and callable(value):
            found[rest if kind == "sweep" and rest else name] = value
    return found


def choose(config: str, names: Sequence[str]) -> tuple[list[Point], Callable | None]:
    """Returns the points of a grid, or the function of a search.

    Args:
      config: path of the config file, with ':variant' if any.
      names: as in `--sweep`; empty is the function `sweep`.

    Raises:
      ValueError: the file has no such function, the sweep is empty or yields something
        else than points, or a search is multiplied.
    """
    known, names = functions(config), list(names) or ["sweep"]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--sweep: '{config}' has no '{name}'"
                f"{registry.nearest(name, known)} It has: "
                f"{', '.join(known) or 'no function sweep, sweep_NAME or search'}."
            )
    searches = [n for n in names if n.partition("_")[0] == "search"]
    if searches and len(names) > 1:
        raise ValueError(
            f"--sweep: '{searches[0]}' is a search, and stands alone; --seeds repeats "
            "its trials."
        )
    if searches:
        return [], known[searches[0]]
    factors = [_grid(known[name], name) for name in names]
    if math.prod(map(len, factors)) > _MANY:
        raise ValueError(f"--sweep: more than {_MANY:,} trials.")
    points = []
    for parts in itertools.product(*factors):
        for a, b in itertools.combinations(parts, 2):
            if both := a.keys() & b.keys():
                raise ValueError(
                    f"--sweep: {sorted(both)[0]} is set by two of {', '.join(names)}."
                )
        points.append({key: value for part in parts for key, value in part.items()})
    return unique(points), None


def _grid(function: Callable, name: str) -> list[Point]:
    # One too many is seen by who multiplies them; a generator may have no end.
    begun = itertools.islice(function(), _MANY + 1)
    points = [check_point(point, name) for point in begun]
    if not points:
        raise ValueError(f"--sweep: '{name}' is empty.")
    return points


def check_point(point: Any, name: str) -> Point:
    """Returns a point as it is after a round trip through JSON.

    Raises:
      ValueError: it is no dictionary of keys 'config.…', or holds no plain values.
    """
    if not isinstance(point, Mapping):
        raise ValueError(f"--sweep: '{name}' gave {point!r}, not a dictionary.")
    for key in point:
        if not isinstance(key, str) or not key.startswith("config."):
            raise ValueError(
                f"--sweep: '{name}' sets {key!r}; keys are 'config.…', as in the flags."
            )
    try:
        return json.loads(json.dumps(point))
    except TypeError as error:
        raise ValueError(f"--sweep: '{name}': {error}.") from None


def unique(points: Iterable[Point]) -> list[Point]:
    """Returns the points in order, each once."""
    return list({json.dumps(p, sort_keys=True): p for p in points}.values())


def repeat(points: Sequence[Point], seeds: int, first: int) -> list[Point]:
    """Returns every point with `seeds` seeds, from `first` on.

    One seed is stated too: with more of them later it is the same trial.

    Raises:
      ValueError: several seeds, and a point sets the seed itself.
    """
    if any(SEED in point for point in points):
        if seeds > 1:
            raise ValueError(f"--seeds: the sweep sets {SEED} itself.")
        return list(points)
    return [{**point, SEED: first + i} for point in points for i in range(seeds)]


def word(key: str, value: Any) -> str:
    """Returns the flag without its dashes, 'config.a.b=value', that sets a value."""
    text = value if isinstance(value, str) else repr(value)
    return f"{key}={text}"


def resolve(
    config: str, overrides: Mapping[str, Any], teacher: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the config that a trial would have.

    Args:
      config: path of the file.
      overrides: key -> value.
      teacher: config of the teacher's run, where that is not trained yet.

    Raises:
      ValueError, TypeError, FileNotFoundError: the program would refuse it; the message
        names the key.
    """
    found = config_lib.load(config)
    assignments = [
        word(key, value).removeprefix("config.") for key, value in overrides.items()
    ]
    stored = None
    if teacher is not None:
        stored = {"teacher": {"run": overrides[TEACHER], "config": teacher}}
    inherit.override(found, assignments, stored=stored)
    return config_lib.resolve(found)


def is_sweep(folder: str | pathlib.Path) -> bool:
    """Whether a directory is of a sweep."""
    return (pathlib.Path(folder) / "sweep.json").is_file()


def read_sweep(folder: pathlib.Path) -> dict[str, Any]:
    """Returns sweep.json.

    Raises:
      FileNotFoundError: the directory is of no sweep.
    """
    if not is_sweep(folder):
        raise FileNotFoundError(
            f"'{folder}' holds no sweep (there is no sweep.json); start one with "
            "python -m launch sweep."
        )
    return workdir.read_json(folder / "sweep.json")


def config_of(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config that a run of the launcher has, or will have.

    Args:
      folder: a run directory, or a sweep's, of which the first trial is taken.

    Returns:
      None where nothing of the launcher is there.
    """
    if is_sweep(folder):
        asked = read_sweep(folder)
        started = sorted((folder / "runs").glob("*/config.json"))
        if started:
            return config_lib.completed(workdir.read_json(started[0]))
        point = (asked["points"] or [{}])[0]
        return _resolve_there(asked, {**asked["overrides"], **point})
    if (folder / "config.json").is_file():
        return config_lib.completed(workdir.read_config(folder))
    if (folder / "trial.json").is_file():
        asked = workdir.read_json(folder / "trial.json")
        return _resolve_there(asked, {**asked["overrides"], **asked.get("point", {})})
    return None


def _resolve_there(asked: Mapping[str, Any], overrides: Point) -> dict[str, Any]:
    """Resolves where the command was given: its paths are as the user wrote them."""
    with there(asked):
        return resolve(asked["config"], overrides)


@contextlib.contextmanager
def there(asked: Mapping[str, Any]) -> Iterator[None]:
    """Works in the folder in which a command was given.

    Raises:
      FileNotFoundError: it is not here.
    """
    if not pathlib.Path(asked["cwd"]).is_dir():
        raise FileNotFoundError(
            f"'{asked['cwd']}', where this was started, is not here: the paths of "
            f"{asked['config']} are relative to it."
        )
    with contextlib.chdir(asked["cwd"]):
        yield


def settled(overrides: Mapping[str, Any], folder: pathlib.Path) -> Point:
    """Returns the overrides as the run in a directory has them.

    Which trial of a sweep is the teacher is decided when its student starts; from then
    on the student's own config says so.
    """
    teacher, path = overrides.get(TEACHER), folder / "config.json"
    if isinstance(teacher, str) and is_sweep(teacher) and path.is_file():
        stored = workdir.read_json(path).get("teacher", {}).get("run")
        return {**overrides, TEACHER: stored or teacher}
    return dict(overrides)


def check(config: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a trial, whose teacher may be one that is still to come.

    Raises:
      ValueError, TypeError, FileNotFoundError: as `resolve`.
    """
    teacher = overrides.get(TEACHER)
    if isinstance(teacher, str) and (found := config_of(pathlib.Path(teacher))):
        return resolve(config, overrides, found)
    return resolve(config, overrides)
