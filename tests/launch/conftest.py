"""A sweep, and an engine of whose jobs the test decides."""

import dataclasses
import json

import pytest

from launch import definition, driver, sweep
from launch.engines import EngineError
from launch.trial import Trial

CONFIG = """
from configs import common
from configs.mixture import denoising

def get_config(variant=""):
    return denoising.get_config("smoke")

SEED, STEPS = "config.seed", "config.train.num_steps"

def sweep():
    for steps in (10, 20, 30):
        yield {STEPS: steps}

def search(trial):
    return {STEPS: trial.suggest_int("steps", 1, 40)}

def search_two(trial):
    return {STEPS: trial.suggest_int("steps", 1, 2)}

def search_bad(trial):
    return {STEPS if trial.number == 0 else "config.train.num_stesp": 3}
"""


@dataclasses.dataclass
class Engine:
    """Jobs live until the test ends them."""

    queues: bool = False
    ends_with_driver: bool = True
    jobs: dict = dataclasses.field(default_factory=dict)
    live: dict = dataclasses.field(default_factory=dict)
    stopped: list = dataclasses.field(default_factory=list)
    broken: bool = False
    parallel: int = 0

    def submit(self, jobs, submission, parallel):
        if self.broken:
            raise EngineError("no room")
        self.parallel, names = parallel, []
        for index, job in enumerate(jobs):
            name = str(len(self.jobs) + 1)
            self.jobs[name] = (job, submission, index)
            self.live[name] = "running"
            names.append(name)
        return names

    def alive(self):
        return dict(self.live)

    def find(self, submission, index):
        for name in self.live:
            if self.jobs[name][1:] == (submission, index):
                return name
        return None

    def cause(self, job):
        return None

    def stop(self, jobs):
        self.stopped += jobs
        for job in jobs:
            self.live.pop(job, None)

    def log(self, job):
        return None

    # What a job's process would do.

    def start(self, name):
        job, submission, _ = self.jobs[name]
        Trial(job.folder).record("started", job=name, submission=submission)

    def end(self, name, cause, value=1.0, **what):
        folder = self.jobs[name][0].folder
        if cause == "done":
            row = {"step": 5, "train/loss": value}
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
            asked = Trial(folder).asked()
            steps = asked["point"].get("config.train.num_steps", 10)
            (folder / "config.json").write_text(
                json.dumps({"train": {"num_steps": steps}})
            )
            result = {"step": steps, "numbers": {}}
            (folder / "result.json").write_text(json.dumps(result))
        Trial(folder).record("ended", job=name, cause=cause, **what)
        del self.live[name]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a" / "b" / "config.py"
    path.parent.mkdir(parents=True)
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def asked(config):
    return {
        "config": config,
        "overrides": {},
        "sweeps": ["sweep"],
        "seeds": 1,
        "seed": 0,
        "num_trials": 0,
        "metric": "train/loss",
        "goal": "min",
        "prune": "",
        "max_parallel": 2,
        "max_failures": 2,
        "flags": [],
        "cwd": "/",
    }


@pytest.fixture
def engine():
    """`engine(**fields)`: see `Engine`."""
    return Engine


@pytest.fixture
def make(tmp_path, asked):
    """`make(**changes)`: a sweep; the same directory every time."""

    def build(engine=None, folder="sweep", extend=False, extra=(), **changes):
        new = {**asked, **changes}
        points, search = definition.choose(new["config"], new["sweeps"])
        new["points"] = definition.repeat([*points, *extra], new["seeds"], 0)
        new["search"] = new["sweeps"][0] if search else ""
        sweep.check(tmp_path / folder, new, extend)
        books = sweep.create(tmp_path / folder, new)
        said = []
        here = driver.Driver(books, engine or Engine(), said.append, "here")
        here.said = said
        return here

    return build
