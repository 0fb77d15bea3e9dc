"""Which part of each array lies on which device.

Mesh axes are 'data', 'fsdp' and 'tensor'. A network says by regular expression which
logical axes its parameters have; the config's rules say on which mesh axis a logical
axis lies. A parameter without an 'fsdp' axis gets it on its largest dimension that
divides. Optimiser state and averages lie as the parameter whose path they end in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusionlab.settings import Mesh
from diffusionlab.types import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def fits(settings: Mesh) -> bool:
    """Whether the sizes of the mesh multiply to the number of devices."""
    return math.prod(_sizes(settings)) == jax.device_count()


def _sizes(settings: Mesh) -> tuple[int, ...]:
    """The sizes, with -1 replaced by what the devices leave, if they divide."""
    sizes = [settings.data, settings.fsdp, settings.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and jax.device_count() % known == 0:
        sizes[sizes.index(-1)] = jax.device_count() // known
    return tuple(sizes)


def make_mesh(settings: Mesh) -> jax.sharding.Mesh:
    """Returns the mesh over all devices of all processes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    if not fits(settings):
        raise ValueError(
            f"config.mesh: data x fsdp x tensor = {settings.data} x {settings.fsdp} x "
            f"{settings.tensor} does not make the {jax.device_count()} "
            "devices present."
        )
    return jax.make_mesh(_sizes(settings), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh) -> NamedSharding:
    """Leaves `[B, ...]` are split over 'data' and 'fsdp'."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Placement(NamedTuple):
    """Where a parameter lies, and which mesh axes it could not be divided by."""

    spec: PartitionSpec
    undivided: tuple[str, ...]


def place(
    path: str,
    shape: tuple[int, ...],
    param_axes,
    rules: Mapping[str, str | None],
    mesh,
) -> Placement:
    """Returns where a parameter lies.

    Args:
      path: 'transformer/block/mlp/up/kernel'.
      shape: of the parameter. Logical axes stand for its last dimensions, so that a
        stack of layers obeys the rule of one.
      param_axes: `(regex, logical axes)` of the network; the first match counts.
      rules: logical axis -> mesh axis.
      mesh: axes of size 1 divide everything and shard nothing.
    """
    assigned: list[str | None] = [None] * len(shape)
    undivided = []
    logical = next((a for r, a in param_axes if re.search(r, path)), ())
    offset = len(shape) - len(logical)
    for i, name in enumerate(logical):
        axis = rules.get(name) if name else None
        if axis is None or mesh.shape[axis] == 1 or axis in assigned:
            continue
        if shape[offset + i] % mesh.shape[axis]:
            undivided.append(axis)
        else:
            assigned[offset + i] = axis
    if mesh.shape["fsdp"] > 1 and "fsdp" not in assigned:
        free = [
            i
            for i, size in enumerate(shape)
            if assigned[i] is None and size % mesh.shape["fsdp"] == 0 and size
        ]
        if free:
            assigned[max(free, key=lambda i: shape[i])] = "fsdp"
            undivided = [axis for axis in undivided if axis != "fsdp"]
        elif "fsdp" not in undivided:
            undivided.append("fsdp")
    while assigned and assigned[-1] is None:
        assigned.pop()
    return Placement(PartitionSpec(*assigned), tuple(undivided))


def place_tree(tree: Any, param_axes, rules, mesh) -> Any:
    """Returns the tree of `Placement` of one role's parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(path_name(path), leaf.shape, param_axes, rules, mesh),
        tree,
    )


def follow(tree: Any, params: Any, placements: Any, mesh) -> Any:
    """Shardings of a tree whose leaves belong to parameters: optimiser state.

    A leaf follows the parameter whose path its own path ends in, if their shapes agree;
    any other leaf (a count, a factored moment) falls back to FSDP.
    """
    is_placement = lambda leaf: isinstance(leaf, Placement)  # noqa: E731
    named = {
        path_name(path): (leaf.shape, placement)
        for (path, leaf), placement in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(placements, is_leaf=is_placement),
            strict=True,
        )
    }

    def shard(path, leaf):
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, placement = named.get("/".join(parts[start:]), (None, None))
            if shape is not None and shape == leaf.shape:
                return NamedSharding(mesh, placement.spec)
        return NamedSharding(mesh, place("", leaf.shape, (), {}, mesh).spec)

    return jax.tree_util.tree_map_with_path(shard, tree)


def bytes_per_device(leaf, sharding: NamedSharding) -> int:
    """Bytes of the part of an array that lies on one device."""
    return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def total_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree on one device."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(bytes_per_device(leaf, sharding) for leaf, sharding in leaves)


def table(roles: Mapping[str, tuple[Any, Any]], mesh) -> str:
    """A table parameter -> shape, sharding, bytes per device, for the log.

    What an axis could not divide is named on its row and in a closing line.

    Args:
      roles: role -> (parameters or shapes, placements).
      mesh: the mesh.
    """
    rows, undivided, total = [], [], 0
    for role, (params, placements) in roles.items():
        leaves = jax.tree_util.tree_leaves_with_path(params)
        is_placement = lambda leaf: isinstance(leaf, Placement)  # noqa: E731
        places = jax.tree.leaves(placements, is_leaf=is_placement)
        for (path, leaf), placement in zip(leaves, places, strict=True):
            name = f"{role}/{path_name(path)}"
            size = bytes_per_device(leaf, NamedSharding(mesh, placement.spec))
            total += size
            note = f"  not divided by {', '.join(placement.undivided)}"
            rows.append(
                f"  {name:<60} {leaf.shape!s:<20} {_spec_text(placement.spec):<24} "
                f"{size:>12,}{note if placement.undivided else ''}"
            )
            if placement.undivided:
                undivided.append(name)
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)
    lines = [f"mesh: {sizes}; parameters, their sharding and bytes per device:", *rows]
    lines.append(f"  {'total':<106} {total:>12,}")
    if undivided:
        lines.append(
            f"  {len(undivided)} parameters cannot be divided by an axis that should "
            f"shard them and are whole along it: {', '.join(undivided)}"
        )
    return "\n".join(lines)


def _spec_text(spec: PartitionSpec) -> str:
    return "(" + ", ".join(str(axis or "-") for axis in spec) + ")"
