"""Shared by all tests: eight virtual CPU devices, one cache of compiled programs."""

import os
import pathlib
import subprocess
import sys
import tempfile

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time goes into compiling its programs, so they are not optimised;
# those that tests start in processes of their own are.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"diffusionlab-tests-{os.getuid()}"),
)
os.environ["DIFFUSIONLAB_CACHE"] = str(
    pathlib.Path(tempfile.gettempdir()) / f"diffusionlab-tests-features-{os.getuid()}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def program():
    """`program(*args, devices=1, check=True, **kw)` runs diffusionlab in a process."""

    def run(*args, devices=1, check=True, env=None, timeout=300, **kw):
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-m", "diffusionlab.main", *map(str, args)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            **kw,
        )
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done

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
