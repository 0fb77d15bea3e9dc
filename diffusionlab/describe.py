"""mode=config and mode=doctor: what a run would be, and what this machine is."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview

from diffusionlab import compiled, machine, revision, sharding, teachers
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib


def describe(config: Mapping[str, Any]) -> str:
    """Returns parameters, FLOPs and bytes of a run; compiles and runs nothing.

    Args:
      config: resolved.
    """
    with contextlib.suppress(FileNotFoundError):  # of a run that has started, it may go
        teachers.check_start(config)
    experiment = experiment_lib.build(config)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        steps = compiled.Steps(experiment, mesh, teachers.abstract(experiment, mesh))
        places = state_lib.placements(experiment, mesh)
        params = steps.state.params
        lines = [sharding.table({r: (params[r], places[r]) for r in params}, mesh)]
        for role, tree in params.items():
            count = parameter_overview.count_parameters(tree)
            lines.append(f"parameters of {role}: {count:,}")
        work = compiled.flops_of_step(experiment, steps)
        lines.append(f"model FLOPs per step: {work:.4g}")
        where = jax.tree.map(lambda s: s.sharding, steps.state)
        size = sharding.total_bytes(steps.state, where)
        lines.append(f"train state: {size:,} bytes per device")
        for name, step in steps.compile().items():
            memory = step.memory_analysis()
            lines.append(
                f"step of phase {name}: {memory.argument_size_in_bytes:,} bytes of "
                f"arguments and {memory.temp_size_in_bytes:,} of temporaries per device"
            )
    return "\n".join(lines)


def doctor(folder: pathlib.Path, cache: str) -> str:
    """Returns devices, versions, cache, disk and matrix rate of this machine.

    Args:
      folder: where the disk is measured.
      cache: folder of compiled programs, or 'off'.
    """
    folder = folder if folder.is_dir() else pathlib.Path()
    found = [f"{d.platform} {d.device_kind} (id {d.id})" for d in jax.devices()]
    lines = [f"devices: {len(found)}", *(f"  {d}" for d in found)]
    lines += ["versions:"]
    lines += [f"  {name} {version}" for name, version in machine.versions().items()]
    lines.append(f"revision: {revision.git_revision() or 'unknown'}")
    lines.append(f"compilation cache: {_cache(cache)}")
    lines.append(f"disk: {machine.disk_rate(folder) / 1e6:,.0f} MB/s into {folder}")
    for dtype in ("float32", "bfloat16"):
        rate = machine.matrix_rate(dtype)
        lines.append(f"matrix rate, {dtype}: {rate / 1e9:,.0f} GFLOP/s per device")
    if sheet := machine.datasheet_rate():
        lines.append(f"data sheet, bfloat16: {sheet / 1e9:,.0f} GFLOP/s per device")
    return "\n".join(lines)


def _cache(cache: str) -> str:
    if cache == "off":
        return "off"
    files = [f for f in pathlib.Path(cache).rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    return f"{cache}, {len(files)} files, {size / 1e6:,.1f} MB"
