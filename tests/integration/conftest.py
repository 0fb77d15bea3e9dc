"""Whole runs, as small as they can be: seconds each."""

import functools
import json
import pathlib
import signal

import jax
import numpy as np
import pytest

from diffusionlab import compiled, experiment, sharding, teachers
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.types import path_name

# No pictures, no evaluators: what is about training needs none.
BARE = (
    "logging.samples_every=0",
    "evals={}",
    "checkpoint.best=''",
    "logging.tensorboard=False",
)


@pytest.fixture(autouse=True)
def _own_signals():
    """A run in this process listens to SIGTERM; the tests after it should not."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def smoke(smoke):
    """`smoke(name, *overrides, bare=True)`: a smoke config, without pictures."""

    def make(name, *overrides, bare=True):
        return smoke(name, *(BARE if bare else ()), *overrides)

    return make


@pytest.fixture(scope="session")
def flags(root):
    """`flags(name, folder, *overrides)`: the same as flags of the program."""

    def make(name, folder, *overrides):
        config = f"{root}/configs/{name}/denoising.py:smoke"
        words = [f"--config={config}", f"--workdir={folder}"]
        return [*words, *(f"--config.{o}" for o in (*BARE, *overrides))]

    return make


@pytest.fixture(scope="session")
def contents():
    """`contents(config, folder, step)`: all a checkpoint holds, path -> numpy array."""

    @functools.lru_cache(maxsize=2)
    def wanted(text):
        built = experiment.build(json.loads(text))
        mesh = sharding.make_mesh(built.mesh)
        with jax.set_mesh(mesh):
            steps = compiled.Steps(built, mesh, teachers.abstract(built, mesh))
            return mesh, state_lib.abstract(built, mesh), steps.abstract_gathered()

    def read(config, folder, step):
        mesh, *shapes = wanted(json.dumps(config, sort_keys=True))
        with jax.set_mesh(mesh):
            state, gathered, data, meta = Checkpoints(folder).restore(step, *shapes)
        assert meta["step"] == step
        tree = {"state": state, "gathered": gathered, "data": data}
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): np.asarray(leaf) for path, leaf in leaves}

    return read


@pytest.fixture(scope="session")
def same():
    """`same(a, b)` asserts that two results of `contents` are equal bit for bit."""

    def compare(a, b):
        assert a.keys() == b.keys()
        differing = [name for name in a if a[name].tobytes() != b[name].tobytes()]
        assert not differing
        return True

    return compare


@pytest.fixture(scope="session")
def rows():
    """`rows(folder)`: the rows of metrics.jsonl without what depends on the clock."""

    def read(folder):
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
            for line in lines
        ]

    return read


@pytest.fixture(scope="session")
def steps_of():
    """`steps_of(folder)`: the steps of the finished checkpoints."""

    def read(folder):
        names = (p.name for p in (pathlib.Path(folder) / "checkpoints").iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    return read
