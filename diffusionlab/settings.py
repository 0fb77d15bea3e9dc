"""The blocks of a config that build no registered object, as plain dataclasses.

Nothing here imports JAX: a config is checked against these before it is loaded.
Durations are in optimiser steps; 0 means never.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VIRTUAL_DEVICES = (
    "--xla_force_host_platform_device_count={} "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
)
"""Flags of XLA. Without the second, two collectives that may start in any order wait
for each other for ever where devices outnumber cores (jax 0.10)."""

LOGICAL_AXES = ("embed", "mlp", "heads", "vocab", "conv_in", "conv_out")
"""What a dimension of a parameter may mean; a plug-in network may name others."""


def _at_least(settings, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value < minimum:
            raise ValueError(f"{name}: must be at least {minimum}, got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on.

    Attributes:
      source: block of a data source; see `data/sources.py`.
      batch_size: global, over all processes and micro-batches.
      augment: random changes by name, see `data/augment.py`.
      num_threads: batches that are prepared at the same time.
      prefetch: batches that may wait for the step.
    """

    source: Mapping
    batch_size: int
    augment: Mapping = dataclasses.field(default_factory=dict)
    num_threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        _at_least(self, 1, "batch_size", "num_threads", "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The run that is distilled; `--config.teacher=FOLDER` sets `run`.

    Attributes:
      run: its directory; '' is no teacher.
      step: of its checkpoint; None is the newest.
      ema: name of its average, or 'none'; '' is the default of that run.
      start: what students start from: '' is the teacher, else the directory of another
        run with the same process, or 'random'.
      config: of the teacher's run; the program fills it in.
    """

    run: str = ""
    step: int | None = None
    ema: str = ""
    start: str = ""
    config: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for key in self.config if not self.run else ():
            raise ValueError(f"config.{key}: is of the teacher's run, and run is ''.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimiser of one role.

    Attributes:
      name: see `optim.OPTIMIZERS`, or 'module:function' of an optax-like function.
      learning_rate: block of a schedule: constant, cosine, linear, inverse_sqrt.
      options: further keywords of the optax function.
      clip_norm: global norm to which gradients are clipped; 0 is off.
      weight_decay: of the optimiser, where it has one.
      decay_on: regular expressions over parameter paths that decay.
      multipliers: pairs (regular expression, factor on the learning rate); 0 freezes.
        Factors of several patterns that match one parameter multiply.
    """

    name: str
    learning_rate: Mapping
    options: Mapping = dataclasses.field(default_factory=dict)
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    decay_on: tuple = (".*kernel$",)
    multipliers: tuple = ()

    def __post_init__(self):
        _at_least(self, 0, "clip_norm", "weight_decay")
        for pair in self.multipliers:
            if len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError(
                    f"multipliers: expected pairs (pattern, factor), got {pair!r}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How long to train, and in how many pieces a step computes its gradient."""

    num_steps: int
    micro_batches: int = 1

    def __post_init__(self):
        _at_least(self, 0, "num_steps")
        _at_least(self, 1, "micro_batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes, and which logical axis lies on which of them.

    Attributes:
      data, fsdp, tensor: sizes; one may be -1, then it takes the remaining devices.
      rules: logical axis -> mesh axis. A parameter that no rule shards is sharded over
        'fsdp' along its largest divisible dimension.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Mapping = dataclasses.field(
        default_factory=lambda: {"mlp": "tensor", "heads": "tensor", "embed": "fsdp"}
    )

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sum(size == -1 for size in sizes) > 1 or any(
            size == 0 or size < -1 for size in sizes
        ):
            raise ValueError(
                f"data, fsdp, tensor: positive sizes, one may be -1; got {sizes}."
            )
        for logical, axis in self.rules.items():
            if axis not in ("data", "fsdp", "tensor", None):
                raise ValueError(
                    f"rules.{logical}: unknown mesh axis {axis!r}; known: data, fsdp, "
                    "tensor, None."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Parameters and optimiser state are float32; networks compute in `compute`."""

    compute: str = "float32"

    def __post_init__(self):
        if self.compute not in ("float32", "bfloat16"):
            raise ValueError(
                f"compute: expected 'float32' or 'bfloat16', got {self.compute!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: newest checkpoints that stay.
      keep_every: checkpoints at multiples of this stay for ever; 0 keeps none.
      best: number of an evaluator, '<label in config.evals>/<number>' as in
        metrics.jsonl without 'eval/'; the checkpoint with its best value so far stays
        besides the newest. '' keeps none for its value.
      best_mode: 'min' or 'max', which of two values is the better one; must be said
        where `best` is.
      barrier_timeout: seconds a process waits for the others.
    """

    every: int
    keep: int = 2
    keep_every: int = 0
    best: str = ""
    best_mode: str = ""
    barrier_timeout: int = 600

    def __post_init__(self):
        _at_least(self, 1, "every", "keep", "barrier_timeout")
        _at_least(self, 0, "keep_every")
        label, _, number = self.best.partition("/")
        if self.best and not (label and number):
            raise ValueError(
                "best: expected '<evaluator>/<number>', such as 'quality/frechet', or "
                f"'', got {self.best!r}."
            )
        # A guess would keep the worst checkpoint of half of all metrics.
        if self.best_mode not in ("min", "max") and (self.best or self.best_mode):
            raise ValueError(
                "best_mode: expected 'min' or 'max', the better end of best = "
                f"{self.best!r}, got {self.best_mode!r}."
            )
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every: must be a multiple of every = {self.every}, got "
                f"{self.keep_every}."
            )


def check_best(checkpoint: Checkpoint, evals: Mapping[str, Any]) -> None:
    """Checks that every value of `checkpoint.best` is that of a checkpoint.

    Args:
      checkpoint: the settings.
      evals: evaluators by label.

    Raises:
      ValueError: there is no such evaluator, or it runs where nothing is saved.
    """
    if not checkpoint.best:
        return
    label = checkpoint.best.partition("/")[0]
    if label not in evals:
        raise ValueError(
            f"config.checkpoint.best: '{checkpoint.best}' is no number of an evaluator "
            f"in config.evals ({', '.join(evals) or 'there is none'}); begin it with "
            "one of them, or give '' to keep no best checkpoint."
        )
    every = evals[label].every
    if every == 0 or every % checkpoint.every:
        raise ValueError(
            f"config.evals.{label}.every: must be a positive multiple of "
            f"config.checkpoint.every = {checkpoint.every} for config.checkpoint.best, "
            f"got {every}: a best step without a checkpoint cannot be kept."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """What is written while training.

    Attributes:
      every: steps between rows of metrics.jsonl.
      samples_every: steps between sample grids; 0 is never.
      num_samples: images of such a grid; evaluators draw in batches of this size too.
      tensorboard: write TensorBoard events.
      wandb: write to Weights & Biases, project of this name; '' is off.
      profile_from, profile_steps: a window of steps for the profiler; 0 steps is off.
    """

    every: int
    samples_every: int = 0
    num_samples: int = 64
    tensorboard: bool = True
    wandb: str = ""
    profile_from: int = 0
    profile_steps: int = 0

    def __post_init__(self):
        _at_least(self, 1, "every", "num_samples")
        _at_least(self, 0, "samples_every", "profile_from", "profile_steps")
