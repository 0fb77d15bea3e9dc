"""Optimisers by optax's names, with schedules, clipping, masks and multipliers.

One mechanism selects parameters everywhere: regular expressions over the path of a
parameter, 'transformer/block/mlp/up/kernel', and a pattern that selects nothing is an
error. The transformations of a role, in order: clip by global norm, the optimiser
(with weight decay on the parameters that decay), learning-rate multipliers.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax

from diffusionlab import registry
from diffusionlab.settings import Optimizer
from diffusionlab.types import Array, Params, path_name

OPTIMIZERS = {
    name: f"optax:{name}"
    for name in (
        "adabelief",
        "adafactor",
        "adam",
        "adamax",
        "adamw",
        "lamb",
        "lion",
        "nadam",
        "nadamw",
        "radam",
        "rmsprop",
        "sgd",
    )
} | {name: f"optax.contrib:{name}" for name in ("ademamix", "adopt", "muon")}
"""Those that are tested. Another of optax is named 'optax:yogi', and checked too."""

_DECAY_ON = {f.name: f.default for f in dataclasses.fields(Optimizer)}["decay_on"]

_REFUSED = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
"""What optax and JAX raise on an argument that they cannot use."""


def _warm_up(schedule: Callable, warmup_steps: int, peak: float) -> Callable:
    if not warmup_steps:
        return schedule
    ramp = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([ramp, schedule], [warmup_steps])


def constant(value: float, warmup_steps: int = 0) -> Callable:
    """Linear warm-up to `value`, then constant."""
    _check(value, warmup_steps)
    return _warm_up(optax.constant_schedule(value), warmup_steps, value)


def cosine(
    value: float, decay_steps: int, warmup_steps: int = 0, final_value: float = 0.0
) -> Callable:
    """Linear warm-up to `value`, then half a cosine to `final_value` at `decay_steps`.

    Args:
      value: the peak.
      decay_steps: the step at which the end is reached, warm-up included.
      warmup_steps: length of the ramp.
      final_value: the learning rate from `decay_steps` on.
    """
    _check(value, warmup_steps, decay_steps, final_value)
    body = optax.cosine_decay_schedule(
        value, decay_steps - warmup_steps, final_value / value
    )
    return _warm_up(body, warmup_steps, value)


def linear(
    value: float, decay_steps: int, warmup_steps: int = 0, final_value: float = 0.0
) -> Callable:
    """Linear warm-up to `value`, then a line to `final_value`; see `cosine`."""
    _check(value, warmup_steps, decay_steps, final_value)
    body = optax.linear_schedule(value, final_value, decay_steps - warmup_steps)
    return _warm_up(body, warmup_steps, value)


def inverse_sqrt(value: float, warmup_steps: int) -> Callable:
    """Linear warm-up to `value`, then value * sqrt(warmup_steps / step)."""
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps: must be at least 1, got {warmup_steps}.")
    _check(value, warmup_steps)

    def body(count):
        return value * (warmup_steps / (count + warmup_steps)) ** 0.5

    return _warm_up(body, warmup_steps, value)


def _check(
    value: float,
    warmup_steps: int,
    decay_steps: float = math.inf,
    final_value: float = 0.0,
) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"value: must be positive, got {value}.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: must be at least 0, got {warmup_steps}.")
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps: must exceed warmup_steps {warmup_steps}, got {decay_steps}."
        )
    if not 0 <= final_value < math.inf:
        raise ValueError(f"final_value: must be at least 0, got {final_value}.")


def select(params: Params, patterns, where: str) -> Params:
    """Returns a tree of booleans: does the path of a parameter match any pattern?

    Raises:
      ValueError: a pattern matches no parameter, or is no regular expression.
    """
    paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        try:
            matched = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise ValueError(f"{where}: '{pattern}' is no pattern: {error}.") from None
        if not matched:
            close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"{where}: pattern '{pattern}' matches no parameter; some of the "
                f"{len(paths)} paths: {', '.join(close)}."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(p, path_name(path)) for p in patterns), params
    )


def _optimizer_function(name: str, path: str) -> Callable:
    if name not in OPTIMIZERS and ":" not in name:
        raise ValueError(
            f"{path}.name: no optimiser '{name}'{registry.nearest(name, OPTIMIZERS)} "
            f"Known: {', '.join(sorted(OPTIMIZERS))}; or 'module:function', for "
            "example 'optax:yogi'."
        )
    try:
        function = registry.load(OPTIMIZERS.get(name, name))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{path}.name: {str(error).rstrip('.')}.") from None
    if not callable(function):
        raise ValueError(f"{path}.name: '{name}' is no function.")
    return function


def matrix_axes(params: Params) -> Params:
    """Returns which axes of each parameter make a matrix, for muon.

    Only what is called 'kernel' is a matrix, from the features that a layer reads to
    those it writes; a bias, a scale, a table of embeddings or positions is None, and
    muon updates it by Adam. Queries, keys and values of attention read D and write
    heads, `[..., D, H, K]`, and 'out' beside a 'query' reads heads, `[..., H, K, D]`.
    Any other kernel writes its last axis, and reads the axes before it that are no
    stack of layers: a stack shows in the bias, `[L, D]`; without a bias, kernels of two
    and four axes are dense and convolutional, and one more axis is a stack. Each matrix
    of a stack is one by itself.

    Args:
      params: parameters or their shapes.

    Returns:
      A tree of `optax.contrib.MuonDimensionNumbers` or None.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ranks = {path_name(path): len(leaf.shape) for path, leaf in leaves}

    def axes(path, leaf):
        *outer, name = path_name(path).split("/")
        rank = len(leaf.shape)
        if name != "kernel" or rank < 2:
            return None
        if outer and rank > 2 and "/".join([*outer[:-1], "query", "kernel"]) in ranks:
            if outer[-1] in ("query", "key", "value"):
                return optax.contrib.MuonDimensionNumbers((-3,), (-2, -1))
            if outer[-1] == "out":
                return optax.contrib.MuonDimensionNumbers((-3, -2), (-1,))
        stack = ranks.get("/".join([*outer, "bias"]), 1 + rank % 2) - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(stack - rank, -1)), (-1,))

    return jax.tree_util.tree_map_with_path(axes, params)


def peaks(optim: Mapping[str, Optimizer]) -> dict[str, np.ndarray]:
    """Returns `value` of the roles' schedules: ours are in proportion to it.

    A step that takes these as an argument is the same program for every rate: the
    trials of a sweep compile it once. An optimiser of the user's may want a number.
    """
    ours = registry.table("learning_rate")
    return {
        role: np.float32(settings.learning_rate["value"])
        for role, settings in optim.items()
        if settings.name in OPTIMIZERS and settings.learning_rate["name"] in ours
    }


def learning_rate(
    settings: Optimizer, path: str, peak: Array | None = None
) -> Callable:
    """Returns the schedule step -> learning rate of a role.

    Args:
      settings: the block of the config.
      path: where it stands, for messages.
      peak: takes the place of the schedule's `value`, see `peaks`.
    """
    block, path = settings.learning_rate, f"{path}.learning_rate"
    schedule = registry.build("learning_rate", block, path)
    if peak is None:
        return schedule
    shape = {**block, "value": 1.0}
    if "final_value" in block:
        shape["final_value"] = block["final_value"] / block["value"]
    shape = registry.build("learning_rate", shape, path)
    return lambda count: peak * shape(count)


def _check_options(settings: Optimizer, accepted, path: str) -> None:
    for key in settings.options:
        if key not in accepted:
            raise ValueError(
                f"{path}.options.{key}: unknown option of '{settings.name}'"
                f"{registry.nearest(key, accepted)} Accepted: {', '.join(accepted)}."
            )
        if "weight_decay" in key or key == "mask":
            raise ValueError(
                f"{path}.options.{key}: set {path}.weight_decay and {path}.decay_on "
                "instead."
            )
        if key == "learning_rate":
            raise ValueError(f"{path}.options.{key}: set {path}.learning_rate instead.")


def _obstacle(build: Callable, options, params: Params) -> str:
    """Returns why an optimiser cannot train these parameters, or nothing."""
    try:
        optimizer = build(options)
        state = jax.eval_shape(optimizer.init, params)
        found = jax.eval_shape(optimizer.update, params, state, params)
    except _REFUSED as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(
            "."
        )
    wanted, found = (
        [
            (path_name(path), leaf.shape, leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        for tree in ((params, state), found)
    )
    if wanted != found:
        return "its updates or its state change in shape"
    if not optax.tree_utils.tree_get_all_with_path(state, "count"):
        return "its state has no 'count', the number of its updates"
    return ""


def _check_runs(build: Callable, settings: Optimizer, options, params, path) -> None:
    """Checks by shapes alone, so that nothing is found out after the compilation."""
    why = _obstacle(build, options, params)
    if not why:
        return
    for key, value in settings.options.items():
        rest = {k: v for k, v in options.items() if k != key}
        if not _obstacle(build, rest, params):
            raise ValueError(
                f"{path}.options.{key}: '{settings.name}' cannot use {value!r}: {why}."
            )
    raise ValueError(f"{path}.name: '{settings.name}' cannot train this role: {why}.")


def make(
    settings: Optimizer, params: Params, path: str, peak: Array | None = None
) -> optax.GradientTransformation:
    """Builds the optimiser of one role.

    Args:
      settings: the block of the config.
      params: the role's parameters, or their shapes.
      path: where the block stands, for messages: 'config.optim.denoiser'.
      peak: see `learning_rate`.

    Raises:
      ValueError: unknown optimiser or option, one that cannot train these parameters,
        or a pattern that matches nothing.
    """
    function = _optimizer_function(settings.name, path)
    accepted = inspect.signature(function).parameters
    _check_options(settings, accepted, path)
    rate = learning_rate(settings, path, peak)
    options, decay = dict(settings.options), []
    by_matrices = "muon_weight_dimension_numbers" in accepted
    if by_matrices:
        options.setdefault("muon_weight_dimension_numbers", matrix_axes)
    if "weight_decay" in accepted:
        options["weight_decay"] = 0.0
    # The default pattern is checked where it is used: a role may have no kernel.
    if settings.weight_decay or tuple(settings.decay_on) != _DECAY_ON:
        where = select(params, settings.decay_on, f"{path}.decay_on")
    if settings.weight_decay:
        masks = [k for k in ("mask", "weight_decay_mask") if k in accepted]
        if "weight_decay" not in accepted or not masks:
            raise ValueError(
                f"{path}.weight_decay: '{settings.name}' has none; use adamw, lion, "
                "muon, or set it to 0."
            )
        if by_matrices:
            # Its own would pass over what it leaves to Adam.
            rates = lambda count: -settings.weight_decay * rate(count)  # noqa: E731
            decay = [optax.add_decayed_weights(rates, where)]
        else:
            options |= {"weight_decay": settings.weight_decay, masks[0]: where}

    def build(options):
        return function(rate, **options)

    if peak is None:  # with one it is being traced, and was checked before
        _check_runs(build, settings, options, params, path)
    chain = []
    if settings.clip_norm:
        chain.append(optax.clip_by_global_norm(settings.clip_norm))
    chain += [build(options), *decay]
    for pattern, factor in settings.multipliers:
        mask = select(params, (pattern,), f"{path}.multipliers")
        chain.append(optax.masked(optax.scale(factor), mask))
    return optax.chain(*chain)
