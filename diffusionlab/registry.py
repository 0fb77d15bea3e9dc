"""Names in configs -> objects, by kind: `check` without importing JAX, `build` with it.

A registry is a dictionary from a name to 'module:object', so nothing is imported until
it is built. `module:object` is itself accepted as a name: that is how an object from
outside this package plugs in. A block of the config is `{'name': ..., keyword: value}`
with the keywords of the object, in the object's own words; what an object accepts is
read from its source, not by importing it, so a wrong config is answered at once.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

REQUIRED = object()

_PACKAGES = {
    "schedule": "diffusionlab.schedules",
    "times": "diffusionlab.schedules",
    "process": "diffusionlab.processes",
    "network": "diffusionlab.models",
    "weighting": "diffusionlab.objectives",
    "objective": "diffusionlab.objectives",
    "sampler": "diffusionlab.samplers",
    "guidance": "diffusionlab.guidance",
    "grid": "diffusionlab.samplers",
    "basis": "diffusionlab.samplers",
    "source": "diffusionlab.data",
    "augment": "diffusionlab.data",
    "evaluator": "diffusionlab.evals",
    "extractor": "diffusionlab.features",
    "metric": "diffusionlab.metrics",
    "paired_metric": "diffusionlab.metrics",
}
# A kind whose objects live in a second package, too.
_MORE_PACKAGES = {"objective": "diffusionlab.distillation"}

_MODULES = {
    "ema": {
        "exponential": "diffusionlab.ema:Exponential",
        "power": "diffusionlab.ema:Power",
    },
    "learning_rate": {
        "constant": "diffusionlab.optim:constant",
        "cosine": "diffusionlab.optim:cosine",
        "linear": "diffusionlab.optim:linear",
        "inverse_sqrt": "diffusionlab.optim:inverse_sqrt",
    },
}

# Arguments that the experiment supplies; a config never states them.
CONTEXT = {
    "process": ("spec",),
    "network": ("spec", "dtype", "process", "source"),
    "objective": ("process", "networks", "spec", "teacher"),
    "evaluator": (),
}


class Parameter(NamedTuple):
    """One keyword an object accepts: its annotation as text, and its default."""

    annotation: str
    default: Any = REQUIRED


def table(kind: str) -> Mapping[str, str]:
    """Returns the registry of `kind`: name -> 'module:object'."""
    if kind in _MODULES:
        return _MODULES[kind]
    packages = [p[kind] for p in (_PACKAGES, _MORE_PACKAGES) if kind in p]
    tables = [importlib.import_module(package).REGISTRY[kind] for package in packages]
    return {name: where for found in tables for name, where in found.items()}


def nearest(name: str, known) -> str:
    """Returns "; did you mean 'x'?" for the nearest known name, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def target(kind: str, name: str, path: str) -> str:
    """Returns 'module:object' for a name of `kind`.

    Raises:
      ValueError: the name is unknown; lists the known ones and the nearest.
    """
    if not isinstance(name, str):
        raise ValueError(f"{path}.name: expected a string, got {name!r}.")
    if ":" in name:
        return name
    known = table(kind)
    if name not in known:
        raise ValueError(
            f"{path}.name: unknown {kind} '{name}'{nearest(name, known)} "
            f"Known: {', '.join(sorted(known))}; or 'module:object'."
        )
    return known[name]


@functools.cache
def parameters(where: str) -> dict[str, Parameter]:
    """Returns the keywords that the class or function at 'module:object' accepts.

    Read from the module's source text. Where the object is not defined there (a
    re-export), the module is imported to learn where it is.

    Raises:
      ValueError: there is no such module or object, or a default is no literal.
    """
    module_name, _, object_name = where.partition(":")
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(
            f"'{where}': there is no module '{module_name}'; --plugins=FOLDER makes "
            "those of a folder known."
        )
    if spec.origin and spec.origin.endswith(".py"):
        tree = _parse(spec.origin)
        for node in tree.body:
            if getattr(node, "name", None) == object_name:
                if isinstance(node, ast.ClassDef):
                    return _class_parameters(node, where)
                if isinstance(node, ast.FunctionDef):
                    return _function_parameters(node, where)
    return _imported_parameters(where)


@functools.cache
def _parse(origin: str) -> ast.Module:
    return ast.parse(pathlib.Path(origin).read_text(encoding="utf-8"))


def _literal(node: ast.expr) -> Any:
    """The value of a default: a literal, or what a dataclass field makes of one."""
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "default":
                return ast.literal_eval(keyword.value)
            if keyword.arg == "default_factory":
                factory = keyword.value
                if isinstance(factory, ast.Lambda):
                    return ast.literal_eval(factory.body)
                return {"dict": {}, "list": [], "tuple": ()}[ast.unparse(factory)]
    return ast.literal_eval(node)


def _default(node: ast.expr, name: str, where: str) -> Any:
    try:
        return _literal(node)
    except (ValueError, KeyError):
        raise ValueError(
            f"'{where}': the default of '{name}' is no literal, so no config can "
            "state it; write out its value."
        ) from None


def _class_parameters(node: ast.ClassDef, where: str) -> dict[str, Parameter]:
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, annotation = item.target.id, ast.unparse(item.annotation)
            default = REQUIRED if not item.value else _default(item.value, name, where)
            found[name] = Parameter(annotation, default)
    return found


def _function_parameters(node: ast.FunctionDef, where: str) -> dict[str, Parameter]:
    spec = node.args
    positional = spec.posonlyargs + spec.args
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    pairs = [*zip(positional, defaults, strict=True)]
    pairs += zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    return {
        arg.arg: Parameter(
            ast.unparse(arg.annotation) if arg.annotation else "",
            REQUIRED if default is None else _default(default, arg.arg, where),
        )
        for arg, default in pairs
    }


def _imported_parameters(where: str) -> dict[str, Parameter]:
    imported = load(where)
    home = f"{imported.__module__}:{imported.__qualname__}"
    if home != where and "." not in imported.__qualname__:
        return parameters(home)
    found = {}
    for name, parameter in inspect.signature(imported).parameters.items():
        default = parameter.default
        required = default is inspect.Parameter.empty
        found[name] = Parameter(
            str(parameter.annotation), REQUIRED if required else default
        )
    return found


def load(where: str) -> Any:
    """Imports and returns the object at 'module:object'."""
    module_name, _, object_name = where.partition(":")
    module = importlib.import_module(module_name)
    try:
        return getattr(module, object_name)
    except AttributeError:
        raise ValueError(
            f"'{where}': '{module_name}' has no '{object_name}'."
        ) from None


_LISTS = (list, tuple)
_TYPES = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "tuple": (list, tuple),
    "list": (list, tuple),
    "dict": Mapping,
    "Mapping": Mapping,
}


def _words(annotation: str) -> list[str]:
    """'tuple[int, ...] | None' -> ['tuple', 'None']."""
    return [word.partition("[")[0].strip() for word in annotation.split("|")]


def _expects_block(parameter: Parameter, value: Any) -> bool:
    """Whether a keyword named as a kind takes an object, not a number or a mapping."""
    if isinstance(value, Mapping) and "name" in value:
        return True
    words = set(_words(parameter.annotation)) - {"None"}
    return value is not None and not words & {*_TYPES, "Any", ""}


def _check_type(value: Any, annotation: str, path: str) -> None:
    words = _words(annotation)
    if not all(word in _TYPES or word == "None" for word in words):
        return
    for word, part in zip(words, annotation.split("|"), strict=True):
        if word == "None" and value is None:
            return
        if word in _TYPES and isinstance(value, _TYPES[word]):
            if isinstance(value, bool) and word != "bool":
                continue
            if part.strip().endswith(", ...]"):
                element = part.strip().removeprefix("tuple[").removesuffix(", ...]")
                for i, one in enumerate(value):
                    _check_type(one, element, f"{path}[{i}]")
            return
    raise TypeError(f"{path}: expected {annotation}, got {value!r}.")


def complete(block: Mapping[str, Any], where: str, path: str, context=()) -> dict:
    """Checks the keywords of a block against the object and fills in its defaults.

    Args:
      block: the block of the config; 'name' is ignored here.
      where: 'module:object'.
      path: where the block stands, for messages: 'config.sampler'.
      context: keywords that are supplied later, and never by a config.

    Returns:
      The block with every default stated.

    Raises:
      ValueError: a key is unknown or missing; names it, the accepted ones, the nearest.
      TypeError: a value has the wrong type.
    """
    accepted = {k: p for k, p in parameters(where).items() if k not in context}
    result = {"name": block["name"]} if "name" in block else {}
    for key, value in block.items():
        if key == "name" and "name" not in accepted:
            continue
        if key not in accepted:
            names = ", ".join(sorted(accepted)) or "none"
            raise ValueError(
                f"{path}.{key}: unknown key{nearest(key, accepted)} Accepted: {names}."
            )
        _check_type(value, accepted[key].annotation, f"{path}.{key}")
        result[key] = value
    for key, parameter in accepted.items():
        if key in result:
            continue
        if parameter.default is REQUIRED:
            raise ValueError(f"{path}.{key}: missing, and it has no default.")
        result[key] = parameter.default
    for key, value in result.items():
        if key in kinds() and _expects_block(accepted[key], value):
            result[key] = check(key, value, f"{path}.{key}")
        elif key[:-1] in kinds() and key.endswith("s") and isinstance(value, _LISTS):
            # 'samplers' is a list of blocks of the kind 'sampler'.
            result[key] = [
                check(key[:-1], block, f"{path}.{key}[{i}]")
                for i, block in enumerate(value)
            ]
    return result


def kinds() -> set[str]:
    """Returns every kind that has a registry."""
    return set(_PACKAGES) | set(_MODULES)


def check(kind: str, block: Mapping[str, Any], path: str) -> dict:
    """Checks one block of `kind`, and the named blocks inside it, without importing.

    Returns:
      The block with defaults stated.

    Raises:
      ValueError, TypeError: as `target` and `complete`.
    """
    if not isinstance(block, Mapping) or "name" not in block:
        raise ValueError(
            f"{path}: expected a block with a 'name'; known: "
            f"{', '.join(sorted(table(kind)))}."
        )
    where = target(kind, block["name"], path)
    try:
        return complete(block, where, path, CONTEXT.get(kind, ()))
    except ValueError as error:
        if str(error).startswith("'"):
            raise ValueError(f"{path}.name: {error}") from None
        raise


def build(kind: str, block: Mapping[str, Any], path: str, **context: Any) -> Any:
    """Imports and builds the object a block describes, nested named blocks first.

    Args:
      kind: 'schedule', 'sampler', ...
      block: `{'name': ..., keyword: value}`.
      path: where the block stands, for messages.
      **context: what the experiment supplies; passed on where the object accepts it.

    Raises:
      ValueError: as `check`, or raised by the object itself, then prefixed by `path`.
    """
    checked = check(kind, block, path)
    where = target(kind, checked.pop("name"), path)
    arguments = {}
    for key, value in checked.items():
        if isinstance(value, Mapping) and "name" in value and key in kinds():
            value = build(key, value, f"{path}.{key}", **context)
        elif key[:-1] in kinds() and key.endswith("s") and isinstance(value, _LISTS):
            value = tuple(
                build(key[:-1], block, f"{path}.{key}[{i}]", **context)
                for i, block in enumerate(value)
            )
        arguments[key] = _freeze(value)
    accepted = parameters(where)
    arguments |= {k: v for k, v in context.items() if k in accepted}
    try:
        return load(where)(**arguments)
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if message.startswith("config.") else f"{path}.{message}"
        ) from error


def _freeze(value: Any) -> Any:
    """Lists become tuples, so that dataclass fields are hashable."""
    return (
        tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value
    )


def plug_in_path(folder: str) -> None:
    """Makes modules in `folder` importable, for 'module:object' names."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
