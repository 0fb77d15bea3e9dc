"""Optimisers by optax's names, with schedules, clipping, masks and multipliers.

One mechanism selects parameters everywhere: regular expressions over the path of a
parameter, 'transformer/block/mlp/up/kernel', and a pattern that selects nothing is an
error. The transformations of a role, in order: clip by global norm, the optimiser
(with weight decay on the parameters that decay), learning-rate multipliers.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable

import jax
import optax

from diffusionlab import registry
from diffusionlab.settings import Optimizer
from diffusionlab.types import Params, path_name


def _warm_up(schedule: Callable, warmup_steps: int, peak: float) -> Callable:
    if not warmup_steps:
        return schedule
    ramp = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([ramp, schedule], [warmup_steps])


def constant(value: float, warmup_steps: int = 0) -> Callable:
    """Linear warm-up to `value`, then constant."""
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
    _check_length(decay_steps, warmup_steps)
    body = optax.cosine_decay_schedule(
        value, decay_steps - warmup_steps, final_value / value
    )
    return _warm_up(body, warmup_steps, value)


def linear(
    value: float, decay_steps: int, warmup_steps: int = 0, final_value: float = 0.0
) -> Callable:
    """Linear warm-up to `value`, then a line to `final_value`; see `cosine`."""
    _check_length(decay_steps, warmup_steps)
    body = optax.linear_schedule(value, final_value, decay_steps - warmup_steps)
    return _warm_up(body, warmup_steps, value)


def inverse_sqrt(value: float, warmup_steps: int) -> Callable:
    """Linear warm-up to `value`, then value * sqrt(warmup_steps / step)."""
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps: must be at least 1, got {warmup_steps}.")

    def body(count):
        return value * (warmup_steps / (count + warmup_steps)) ** 0.5

    return _warm_up(body, warmup_steps, value)


def _check_length(decay_steps: int, warmup_steps: int) -> None:
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps: must exceed warmup_steps {warmup_steps}, got {decay_steps}."
        )


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
    if ":" in name:
        return registry.load(name)
    known = {}
    for module in (optax.contrib, optax):
        for key, f in vars(module).items():
            if key.startswith(("_", "scale_by_")) or not inspect.isfunction(f):
                continue
            if "learning_rate" in inspect.signature(f).parameters:
                known[key] = f
    if name in known:
        return known[name]
    raise ValueError(
        f"{path}.name: optax has no optimiser '{name}'{registry.nearest(name, known)} "
        f"Known: {', '.join(sorted(known))}."
    )


def learning_rate(settings: Optimizer, path: str) -> Callable:
    """Returns the schedule step -> learning rate of a role."""
    return registry.build(
        "learning_rate", settings.learning_rate, f"{path}.learning_rate"
    )


def make(
    settings: Optimizer, params: Params, path: str
) -> optax.GradientTransformation:
    """Builds the optimiser of one role.

    Args:
      settings: the block of the config.
      params: the role's parameters, or their shapes.
      path: where the block stands, for messages: 'config.optim.denoiser'.

    Raises:
      ValueError: unknown optimiser or option, or a pattern that matches nothing.
    """
    function = _optimizer_function(settings.name, path)
    accepted = inspect.signature(function).parameters
    options = dict(settings.options)
    for key in options:
        if key not in accepted:
            raise ValueError(
                f"{path}.options.{key}: unknown option of '{settings.name}'"
                f"{registry.nearest(key, accepted)} Accepted: {', '.join(accepted)}."
            )
    if settings.weight_decay:
        masks = [k for k in ("mask", "weight_decay_mask") if k in accepted]
        if "weight_decay" not in accepted or not masks:
            raise ValueError(
                f"{path}.weight_decay: '{settings.name}' has none; use adamw, lion, "
                "muon, or set it to 0."
            )
        options["weight_decay"] = settings.weight_decay
        options[masks[0]] = select(params, settings.decay_on, f"{path}.decay_on")
    elif "weight_decay" in accepted:
        options.setdefault("weight_decay", 0.0)
    chain = []
    if settings.clip_norm:
        chain.append(optax.clip_by_global_norm(settings.clip_norm))
    chain.append(function(learning_rate(settings, path), **options))
    for pattern, factor in settings.multipliers:
        mask = select(params, (pattern,), f"{path}.multipliers")
        chain.append(optax.masked(optax.scale(factor), mask))
    return optax.chain(*chain)
