"""Shared by all tests: eight virtual CPU devices, one cache of compiled programs."""

import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# Two collectives that XLA may start in any order wait for each other for ever where
# virtual devices outnumber cores (jax 0.10). Most of a test's time goes into compiling
# its programs, so they are not optimised; that takes half the time without the fusion
# emitters, which later versions of XLA always use.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"diffusionlab-tests-{os.getuid()}"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

# Configures logging when it is imported, which closes absl's handlers and with them
# pytest's own streams, where absl was there before.
import submitit  # noqa: F401

# Tracing makes millions of small objects that stay: looking through them less often
# saves a twelfth of the time.
gc.set_threshold(200_000, 20, 100)

ROOT = pathlib.Path(__file__).resolve().parent.parent
_, IN_ORDER, UNOPTIMISED = os.environ["XLA_FLAGS"].split(maxsplit=2)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def process():
    """`process(*words, devices=1, optimised=False, check=True, **kw)`: of Python."""

    def run(*words, devices=1, optimised=False, check=True, env=None, **kw):
        flags = f"--xla_force_host_platform_device_count={devices} {IN_ORDER}"
        flags += "" if optimised else f" {UNOPTIMISED}"
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env={**os.environ, "XLA_FLAGS": flags, **(env or {})},
            capture_output=True,
            text=True,
            **{"cwd": ROOT, "timeout": 300, **kw},
        )
        if check:
            said = f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
            assert done.returncode == 0, said
        return done

    return run


@pytest.fixture(scope="session")
def program(process):
    """`program(*args, **kw)` runs diffusionlab in a process."""
    return functools.partial(process, "-m", "diffusionlab.main")


SEVERAL = """
import json, sys
from diffusionlab import main

for words in json.loads(sys.argv[1]):
    print("ran:", *words, flush=True)
    sys.argv = ["diffusionlab", *words]
    try:
        main.main()
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="session")
def programs(process):
    """`programs(list of args, **kw)` runs one after the other, in one process.

    To start a process, and JAX in it, takes longer than most of what they do.
    """

    def run(several, **kw):
        several = [[str(word) for word in args] for args in several]
        return process("-c", SEVERAL, json.dumps(several), **kw)

    return run


@pytest.fixture(scope="session")
def smoke():
    """`smoke(name, *overrides)`: the resolved smoke config of configs/<name>."""
    from diffusionlab import config as config_lib

    def resolve(name, *overrides):
        config = config_lib.load(f"{ROOT}/configs/{name}/denoising.py:smoke")
        config_lib.override(config, overrides)
        return config_lib.resolve(config)

    return resolve


OF_TOKENS = ("discrete_moment_matching", "self_distillation_through_time")


def _trained(config, overrides, folder):
    """The directory of a run of ten steps without pictures and evaluators."""
    import signal

    from diffusionlab import config as config_lib
    from diffusionlab import train

    config = config_lib.load(f"{ROOT}/configs/{config}.py:smoke")
    config_lib.override(config, overrides)
    handler = signal.getsignal(signal.SIGTERM)
    assert train.train(config_lib.resolve(config), folder) == train.DONE
    signal.signal(signal.SIGTERM, handler)
    return folder


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory):
    """The directory of a denoiser of the 2-D mixture, trained for ten steps."""
    bare = ("logging.samples_every=0", "evals={}", "logging.tensorboard=False")
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return _trained("mixture/denoising", bare, folder)


@pytest.fixture(scope="session")
def teacher_of(request, tmp_path_factory):
    """`teacher_of(method)`: the directory of a teacher of what a method distils."""

    @functools.cache
    def of_tokens():
        bare = ("logging.samples_every=0", "evals={}", "logging.tensorboard=False")
        folder = tmp_path_factory.mktemp("token_teacher") / "run"
        return _trained("digits/tokens", bare, folder)

    def find(method):
        if method in OF_TOKENS:
            return of_tokens()
        return request.getfixturevalue("teacher_run")

    return find


@pytest.fixture(scope="session")
def student(teacher_of):
    """`student(method, *overrides)`: the resolved smoke config of a student."""
    from diffusionlab import config as config_lib
    from diffusionlab import inherit

    def resolve(method, *overrides):
        config = config_lib.load(f"{ROOT}/configs/distillation/{method}.py:smoke")
        inherit.override(config, [f"teacher={teacher_of(method)}", *overrides])
        return config_lib.resolve(config)

    return resolve
