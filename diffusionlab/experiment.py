"""A resolved config becomes an `Experiment`: every object built and cross-checked."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusionlab import averages, registry, settings, workdir
from diffusionlab.guidance import base as guidance
from diffusionlab.models import network
from diffusionlab.types import DataSpec, Network, Objective, Process, Sampler, Source


class Reference(NamedTuple):
    """Another run, and which of its parameters one guidance transform uses.

    Attributes:
      experiment: of that run, see `of_run`.
      folder: its run directory.
      step: of the checkpoint; None is the newest.
      ema: name of the average; '' is the default of that run.
      asks: the function of its objective that the transform calls.
      path: of the transform in the config, for messages.
    """

    experiment: Experiment
    folder: pathlib.Path
    step: int | None
    ema: str
    asks: str
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Everything a run is made of; holds no arrays.

    Attributes:
      config: the resolved config.
      train_source, test_source: what is trained on, and what is held out.
      guide: the guidance transforms, in the order of the registry.
      references: for each of them the run it uses, or None.
      ema: averages by name, each with `rate(step)`.
      evals: evaluators by label.
    """

    config: Mapping[str, Any]
    data: settings.Data
    spec: DataSpec
    train_source: Source
    test_source: Source
    augment: tuple
    process: Process
    networks: Mapping[str, Network]
    objective: Objective
    optim: Mapping[str, settings.Optimizer]
    ema: Mapping[str, Any]
    train: settings.Train
    mesh: settings.Mesh
    precision: settings.Precision
    sampler: Sampler
    guide: tuple
    evals: Mapping[str, Any]
    checkpoint: settings.Checkpoint
    logging: settings.Logging
    references: tuple = ()

    @property
    def seed(self) -> int:
        return self.config["seed"]


def _in_registry_order(kind: str, blocks: Mapping[str, Any], path: str) -> tuple:
    """Builds blocks named by their key; plug-ins come after registered ones."""
    return tuple(
        registry.build(kind, {"name": name, **blocks[name]}, f"{path}.{name}")
        for name in _ordered(kind, blocks)
    )


def _ordered(kind: str, blocks: Mapping[str, Any]) -> list[str]:
    known = list(registry.table(kind))
    return sorted(
        blocks, key=lambda n: (known.index(n) if n in known else len(known), n)
    )


def build(config: Mapping[str, Any]) -> Experiment:
    """Builds every object of a resolved config and checks them against each other.

    Raises:
      ValueError: with the path of the offending key and what is accepted.
      FileNotFoundError: the data are not there; says how to prepare them.
    """
    blocks = {
        name: getattr(settings, name.capitalize())(**config[name])
        for name in ("data", "train", "mesh", "precision", "checkpoint", "logging")
    }
    source = config["data"]["source"]
    train_source = registry.build("source", source, "config.data.source")
    test_source = dataclasses.replace(train_source, split="test")
    spec = train_source.spec
    process = registry.build("process", config["process"], "config.process")
    networks = {
        name: network.as_network(
            registry.build(
                "network",
                block,
                f"config.networks.{name}",
                spec=spec,
                dtype=blocks["precision"].compute,
                process=process,
                source=train_source,
            ),
            spec,
        )
        for name, block in config["networks"].items()
    }
    objective = registry.build(
        "objective",
        config["objective"],
        "config.objective",
        process=process,
        networks=networks,
        spec=spec,
    )
    experiment = Experiment(
        config=config,
        **blocks,
        spec=spec,
        train_source=train_source,
        test_source=test_source,
        augment=_in_registry_order(
            "augment", config["data"]["augment"], "config.data.augment"
        ),
        process=process,
        networks=networks,
        objective=objective,
        optim={
            role: settings.Optimizer(**block) for role, block in config["optim"].items()
        },
        ema={
            name: registry.build("ema", block, f"config.ema.{name}")
            for name, block in config["ema"].items()
        },
        sampler=registry.build("sampler", config["sampler"], "config.sampler"),
        guide=_in_registry_order("guidance", config["guidance"], "config.guidance"),
        evals={
            name: registry.build("evaluator", block, f"config.evals.{name}")
            for name, block in config["evals"].items()
        },
    )
    _check(experiment)
    return dataclasses.replace(experiment, references=_references(experiment))


def of_run(folder: pathlib.Path, path: str) -> Experiment:
    """Builds the experiment of a finished or running run, to use its networks.

    It is that of the run's own config, without guidance, evaluators and pictures.

    Args:
      folder: the run directory.
      path: key of the config that names it, for messages.

    Raises:
      FileNotFoundError: there is no run, or none with a checkpoint.
      ValueError: its config cannot be built here.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: '{folder}' holds no run (there is no config.json); give the "
            "directory of a trained one."
        )
    if not workdir.saved_steps(folder):
        raise FileNotFoundError(
            f"{path}: the run in '{folder}' has no checkpoint yet; train it first."
        )
    config = workdir.read_config(folder) | {"guidance": {}, "evals": {}}
    config["logging"] = {**config["logging"], "samples_every": 0}
    try:
        return build(config)
    except ValueError as error:
        raise ValueError(f"{path}: the run in '{folder}': {error}") from None


def _references(experiment: Experiment) -> tuple[Reference | None, ...]:
    """Finds the run each transform uses; one that is off uses none."""
    names = _ordered("guidance", experiment.config["guidance"])
    return tuple(
        None
        if not hasattr(transform, "reference") or transform.off
        else _reference(experiment, transform, f"config.guidance.{name}")
        for name, transform in zip(names, experiment.guide, strict=True)
    )


def _reference(experiment: Experiment, transform: Any, path: str) -> Reference:
    """Checks that z_t and the label mean the same to both runs.

    Raises:
      FileNotFoundError: there is no run, or none with a checkpoint.
      ValueError: the other run differs in what has to agree; says in what.
    """
    folder = pathlib.Path(transform.reference)
    other = of_run(folder, f"{path}.reference")
    theirs, ours = other.process, experiment.process
    pairs = {
        "process": (type(theirs).__name__, type(ours).__name__),
        "process.schedule": tuple(getattr(p, "schedule", None) for p in (theirs, ours)),
        "shape of the data": (other.spec.shape, experiment.spec.shape),
        "number of classes": (other.spec.num_classes, experiment.spec.num_classes),
    }
    for what, (there, here) in pairs.items():
        if there != here:
            raise ValueError(
                f"{path}.reference: the run in '{folder}' has another {what}: {there} "
                f"there, {here} here."
            )
    if not hasattr(other.objective, transform.asks):
        raise ValueError(
            f"{path}.reference: the run in '{folder}' has the objective "
            f"'{other.config['objective']['name']}', which has no "
            f"'{transform.asks}'; it takes one that has: "
            f"{_OBJECTIVES_WITH.get(transform.asks, 'a plug-in')}."
        )
    steps = workdir.saved_steps(folder)
    if transform.step is not None and transform.step not in steps:
        raise ValueError(
            f"{path}.step: no checkpoint of step {transform.step} in '{folder}'; there "
            f"are: {steps}."
        )
    if transform.ema:
        averages.check(other.ema, transform.ema, f"{path}.ema")
    return Reference(other, folder, transform.step, transform.ema, transform.asks, path)


_OBJECTIVES_WITH = {"predict": "denoising", "log_probs": "noisy_classification"}


def _check(experiment: Experiment) -> None:
    roles = experiment.objective.roles
    for role in roles.values():
        if role.network not in experiment.networks:
            raise ValueError(
                f"config.networks: the objective needs a network '{role.network}'; "
                f"there are: {', '.join(experiment.networks)}."
            )
    used = {role.network for role in roles.values()}
    for name in experiment.networks:
        if name not in used:
            raise ValueError(
                f"config.networks.{name}: no role of the objective uses it; used: "
                f"{', '.join(sorted(used))}."
            )
    if set(experiment.optim) != set(roles):
        raise ValueError(
            f"config.optim: has blocks for {sorted(experiment.optim)}, but the "
            f"objective trains {sorted(roles)}."
        )
    for name, role in roles.items():
        for average in role.ema or ():
            if average not in experiment.ema:
                raise ValueError(
                    f"config.ema.{average}: missing; role '{name}' keeps this average."
                )
    batch, micro = experiment.data.batch_size, experiment.train.micro_batches
    if batch % micro:
        raise ValueError(
            f"config.train.micro_batches: {micro} does not divide "
            f"config.data.batch_size ({batch})."
        )
    for name, evaluator in experiment.evals.items():
        _check_evaluator(experiment, evaluator, f"config.evals.{name}")
    _check_guidance(experiment)
    check_sampler(experiment.sampler, experiment, "config.sampler")
    axes = [
        a
        for n in experiment.networks.values()
        for _, axes in n.param_axes
        for a in axes
    ]
    known = {*settings.LOGICAL_AXES, *filter(None, axes)}
    for logical in experiment.mesh.rules:
        if logical not in known:
            raise ValueError(
                f"config.mesh.rules.{logical}: unknown logical axis"
                f"{registry.nearest(logical, known)} Known: {', '.join(sorted(known))}."
            )


def _check_evaluator(experiment: Experiment, evaluator: Any, path: str) -> None:
    for sampler in _samplers(evaluator, path):
        check_sampler(sampler, experiment, f"{path}.sampler")
    try:
        if hasattr(evaluator, "check"):
            evaluator.check(experiment.train_source)
        if hasattr(evaluator, "check_process"):
            evaluator.check_process(experiment.process)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    if getattr(evaluator, "needs_null_label", False):
        _check_null_label(experiment, path)


def _samplers(evaluator: Any, path: str) -> list[Sampler]:
    """Returns what an evaluator runs its own sampler as: at each of its `num_steps`."""
    sampler = getattr(evaluator, "sampler", None)
    if sampler is None:
        return []
    counts = getattr(evaluator, "num_steps", None)
    if not isinstance(counts, tuple):
        return [sampler]
    try:
        return [dataclasses.replace(sampler, num_steps=count) for count in counts]
    except ValueError as error:
        raise ValueError(f"{path}.num_steps: of the sampler, {error}") from None


def check_sampler(sampler: Sampler, experiment: Experiment, path: str) -> None:
    """Raises ValueError where a sampler cannot work for this process and these data.

    One that does not suit all of them has `check(process, spec)`, which raises it.
    """
    parts = ("times", "init", "step", "final", "num_evaluations")
    missing = [part for part in parts if not hasattr(sampler, part)]
    if missing:
        raise ValueError(
            f"{path}.name: {type(sampler).__name__} is no sampler, it has no "
            f"{', '.join(missing)}; see `Sampler` in types.py."
        )
    try:
        sampler.times(experiment.process.schedule)
        if hasattr(sampler, "check"):
            sampler.check(experiment.process, experiment.spec)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    check_noise(sampler, experiment, path)


def check_noise(sampler: Sampler, experiment: Experiment, path: str) -> None:
    """Raises ValueError for an adaptive sampler under guidance with noise of its own.

    Its error control compares answers at neighbouring times, and would find noise.
    """
    noisy = any(
        getattr(guide, "corrupts_labels", False) and not getattr(guide, "off", False)
        for guide in experiment.guide
    )
    if noisy and getattr(sampler, "num_evaluations", 1) is None:
        raise ValueError(
            "config.guidance.cads: draws fresh noise at every time, and "
            f"{path} chooses its steps by comparing neighbouring times; take a sampler "
            "with a number of steps, or noise_scale=0."
        )


def _check_null_label(experiment: Experiment, path: str) -> None:
    if not experiment.spec.num_classes:
        return
    if not getattr(experiment.objective, "label_dropout", 1.0):
        raise ValueError(
            f"{path}: needs a prediction without a label, which "
            "config.objective.label_dropout=0 never trains."
        )


def _check_guidance(experiment: Experiment) -> None:
    try:
        guidance.compose(
            experiment.guide, lambda *_: None, experiment.process, experiment.spec
        )
    except ValueError as error:
        raise ValueError(f"config.guidance: {error}") from None
    if any(getattr(guide, "needs_null_label", False) for guide in experiment.guide):
        _check_null_label(experiment, "config.guidance")
    if experiment.logging.samples_every and not hasattr(
        experiment.objective, "predict"
    ):
        raise ValueError(
            f"config.logging.samples_every: is {experiment.logging.samples_every}, and "
            f"the objective '{experiment.config['objective']['name']}' has nothing to "
            "sample; use 0."
        )
