"""What this machine is and how fast: for run records, `doctor`, and utilisation."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import revision

# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets.
DATASHEET = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "ml_collections",
    "grain",
    "numpy",
    "scikit-learn",
)


def datasheet_rate() -> float | None:
    """Returns the data sheet's bfloat16 FLOP/s of one device, where it is known."""
    kind = jax.devices()[0].device_kind
    matches = [name for name in DATASHEET if kind.startswith(name)]
    return DATASHEET[max(matches, key=len)] if matches else None


def matrix_rate(dtype: str = "float32", size: int | None = None) -> float:
    """Returns the measured FLOP/s of one device on a square matrix product.

    The best of five timings of at least a tenth of a second in all: the rate that the
    device can reach, against which utilisation is counted.

    Args:
      dtype: of the matrices.
      size: of the matrices; by default 1024 on a CPU and 8192 elsewhere.
    """
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    # A mesh of its own: under the run's, the product would be one of all processes.
    device = np.array(jax.local_devices()[:1])
    with jax.set_mesh(jax.sharding.Mesh(device, ("device",))):
        a = jnp.ones((size, size), dtype)
        product = jax.jit(lambda a: a @ a)
        product(a).block_until_ready()
        best = float("inf")
        for _ in range(5):
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < 0.02:
                product(a).block_until_ready()
                calls += 1
            best = min(best, (time.perf_counter() - start) / calls)
    return 2 * size**3 / best


def disk_rate(folder: pathlib.Path, megabytes: int = 64) -> float:
    """Returns bytes per second of a synchronised write into `folder`."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return megabytes * len(block) / (time.perf_counter() - start)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Returns what a reader needs to know to repeat a run."""
    device = jax.devices()[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_revision": revision.git_revision(),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }
