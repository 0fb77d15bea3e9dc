"""Configs: load a file, override, check and complete, store, compare.

Nothing here imports JAX, so a wrong config is answered at once. A resolved config is a
plain nested dictionary in which every default is stated, and which survives JSON.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import pathlib
import re
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from diffusionlab import registry, settings

_SETTINGS = {
    "teacher": settings.Teacher,
    "data": settings.Data,
    "train": settings.Train,
    "mesh": settings.Mesh,
    "precision": settings.Precision,
    "checkpoint": settings.Checkpoint,
    "logging": settings.Logging,
}

BLOCKS = (
    "seed",
    "teacher",
    "data",
    "process",
    "networks",
    "objective",
    "optim",
    "ema",
    "train",
    "mesh",
    "precision",
    "sampler",
    "guidance",
    "evals",
    "checkpoint",
    "logging",
)

_OPTIONAL = {"teacher": {}}

# What may differ between two starts of one run: none of it changes what is learnt.
_OF_A_RUN = (
    "train.num_steps",
    "mesh",
    "data.num_threads",
    "data.prefetch",
    "sampler",
    "guidance",
    "evals",
    "checkpoint",
    "logging",
)
MAY_CHANGE = (*_OF_A_RUN, *(f"teacher.config.{key}" for key in _OF_A_RUN))


def load(path: str) -> ml_collections.ConfigDict:
    """Runs `get_config(variant)` of a config file.

    Args:
      path: 'configs/digits/denoising.py', or with a variant '…/denoising.py:smoke'.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has no `get_config`, or not this variant.
    """
    module, variant = load_module(path)
    return module.get_config(variant)


def load_module(path: str) -> tuple[types.ModuleType, str]:
    """Returns the module of a config file, and the variant; see `load`."""
    file, _, variant = path.partition(":")
    location = pathlib.Path(file)
    if not location.is_file():
        raise FileNotFoundError(f"--config: there is no file '{file}'.")
    # Configs share helpers as `from configs import common`, from any folder.
    root = str(location.resolve().parent.parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    spec = importlib.util.spec_from_file_location(f"_config_{location.stem}", location)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: '{file}' has no function get_config(variant).")
    return module, variant


def override(config: ml_collections.ConfigDict, assignments: Iterable[str]) -> None:
    """Applies 'a.b.c=value' in place; `value` is a Python literal or a plain string.

    A dictionary replaces a whole block. A key that the config does not state may be
    set: `resolve` refuses it if the object does not accept it.

    Raises:
      ValueError: there is no such block, or no '='.
      TypeError: the value has another type than the one it replaces.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--config.{path}: write --config.{path}=VALUE.")
        *parents, last = path.split(".")
        block = config
        for depth, key in enumerate(parents):
            inner = block.get(key)
            if not isinstance(inner, ml_collections.ConfigDict):
                where = ".".join(["config", *parents[:depth]])
                keys = [k for k in block if hasattr(block[k], "keys")]
                raise ValueError(
                    f"{where}.{key}: there is no such block"
                    f"{registry.nearest(key, keys)} Blocks: {', '.join(keys)}."
                )
            block = inner
        value = _parse(text)
        is_word = isinstance(value, str | None) and text != "none"
        if isinstance(block.get(last), str) and not is_word:
            # '2024_10_01' is a name of a folder here, and no number; 'none' is a word.
            value = text
        _set(block, last, value, f"config.{path}")


def _parse(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _set(block: ml_collections.ConfigDict, key: str, value: Any, path: str) -> None:
    old = block.get(key)
    if path == "config.teacher" and isinstance(value, str):
        value = {**(old or {}), "run": value}
    if isinstance(value, dict):
        with block.unlocked():
            block[key] = ml_collections.ConfigDict(value)
        return
    if isinstance(old, ml_collections.ConfigDict):
        raise TypeError(
            f"{path}: is a block; set one of its keys ({', '.join(old)}), or give a "
            "whole block as a Python dictionary."
        )
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, tuple | list) and isinstance(value, tuple | list):
        value = type(old)(value)
    elif old is not None and value is not None and type(old) is not type(value):
        raise TypeError(f"{path}: expected {type(old).__name__}, got {value!r}.")
    with block.unlocked(), block.ignore_type():
        block[key] = value


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks every key and states every default, without importing JAX.

    Returns:
      A plain nested dictionary, the same after a round trip through JSON.

    Raises:
      ValueError: a key is unknown or missing, or a value is out of range.
      TypeError: a value has the wrong type.
    """
    plain = {**_OPTIONAL, **_plain(config)}
    for key in plain:
        if key not in BLOCKS:
            raise ValueError(
                f"config.{key}: unknown key{registry.nearest(key, BLOCKS)} "
                f"Accepted: {', '.join(BLOCKS)}."
            )
    for key in BLOCKS:
        if key not in plain:
            raise ValueError(f"config.{key}: missing.")
    if not isinstance(plain["seed"], int) or isinstance(plain["seed"], bool):
        raise TypeError(f"config.seed: expected int, got {plain['seed']!r}.")
    if not 0 <= plain["seed"] < 2**31:
        raise ValueError(f"config.seed: must be in [0, 2**31), got {plain['seed']}.")
    result: dict[str, Any] = {"seed": plain["seed"]}
    for key in BLOCKS[1:]:
        result[key] = _resolve_block(key, plain[key])
    return json.loads(json.dumps(result))


def _resolve_block(key: str, block: Any) -> dict[str, Any]:
    path = f"config.{key}"
    if not isinstance(block, Mapping):
        raise TypeError(f"{path}: expected a block, got {block!r}.")
    if key in _SETTINGS:
        done = _complete_settings(_SETTINGS[key], block, path)
        if key == "data":
            done["source"] = registry.check("source", done["source"], f"{path}.source")
            done["augment"] = _named("augment", done["augment"], f"{path}.augment")
        if key == "teacher" and done["config"]:
            try:
                done["config"] = resolve(done["config"])
            except ValueError as error:
                raise ValueError(f"config.teacher.{error}") from None
        return done
    if key in ("process", "objective", "sampler"):
        return registry.check(key, block, path)
    if key == "guidance":
        return _named("guidance", block, path)
    if key == "optim":
        done = {}
        for role, b in block.items():
            where = f"{path}.{role}"
            b = _complete_settings(settings.Optimizer, b, where)
            b["learning_rate"] = registry.check(
                "learning_rate", b["learning_rate"], f"{where}.learning_rate"
            )
            done[role] = b
        return done
    if key == "evals":
        return check_evals(block)
    kind = {"networks": "network", "ema": "ema"}[key]
    return {n: registry.check(kind, b, f"{path}.{n}") for n, b in block.items()}


def check_evals(blocks: Any) -> dict[str, Any]:
    """Checks the evaluators of `config.evals` by label; a label is part of file names.

    Returns:
      The blocks with defaults stated.

    Raises:
      ValueError, TypeError: as `resolve`.
    """
    if not isinstance(blocks, Mapping):
        raise TypeError(f"config.evals: expected a block, got {blocks!r}.")
    for label in blocks:
        if not re.fullmatch(r"[\w-]+", label):
            raise ValueError(
                f"config.evals.{label}: a label has letters, digits, - and _ only."
            )
    return {
        label: registry.check("evaluator", block, f"config.evals.{label}")
        for label, block in blocks.items()
    }


def _named(kind: str, blocks: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Blocks whose key is the registered name: guidance and augmentations."""
    done = {}
    for name, block in blocks.items():
        if not isinstance(block, Mapping):
            raise TypeError(f"{path}.{name}: expected a block, got {block!r}.")
        checked = registry.check(kind, {"name": name, **block}, f"{path}.{name}")
        checked.pop("name")
        done[name] = checked
    return done


def _complete_settings(kind: type, block: Any, path: str) -> dict[str, Any]:
    if not isinstance(block, Mapping):
        raise TypeError(f"{path}: expected a block, got {block!r}.")
    done = registry.complete(block, f"{kind.__module__}:{kind.__name__}", path)
    try:
        kind(**done)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    return done


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def differences(old: Mapping, new: Mapping, path: str = "") -> list[str]:
    """Returns lines 'path: old -> new' for every leaf in which two configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        where = f"{path}.{key}" if path else key
        missing = object()
        a, b = old.get(key, missing), new.get(key, missing)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, where)
        elif a is missing or b is missing or a != b:
            show = ["(absent)" if v is missing else repr(v) for v in (a, b)]
            lines.append(f"{where}: {show[0]} -> {show[1]}")
    return lines


def completed(stored: Mapping) -> dict[str, Any]:
    """Returns a stored config with the defaults of options that are younger than it.

    A block of which something is not accepted any more stays as it is.
    """
    done = {**_OPTIONAL, **stored}
    for key in set(BLOCKS[1:]) & set(done):
        with contextlib.suppress(ValueError, TypeError):  # that is then the difference
            done[key] = json.loads(json.dumps(_resolve_block(key, done[key])))
    return done


def _defaults() -> dict[str, Any]:
    return {key: _resolve_block(key, block) for key, block in _OPTIONAL.items()}


def conflicts(stored: Mapping, new: Mapping) -> list[str]:
    """Returns the differences that one run may not have between two starts."""
    return [
        line
        for line in differences(completed(stored), {**_defaults(), **new})
        if not any(line.startswith((f"{key}:", f"{key}.")) for key in MAY_CHANGE)
    ]


def to_text(config: Mapping, indent: str = "") -> str:
    """A config as indented text, one key a line."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", to_text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value!r}")
    return "\n".join(lines)
