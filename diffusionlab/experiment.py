"""A resolved config becomes an `Experiment`: every object built and cross-checked."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusionlab import averages, checks, registry, settings, workdir
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
      teacher: of the run that is distilled, or None.
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
    teacher: Experiment | None = None

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
    if train_source.split != "train":
        raise ValueError(
            f"config.data.source.split: '{train_source.split}' would be trained on; "
            "leave it out, evaluators read both."
        )
    test_source = dataclasses.replace(train_source, split="test")
    spec = train_source.spec
    process = registry.build("process", config["process"], "config.process", spec=spec)
    # Before networks are built: those of a teacher may not fit other data.
    teacher = _teacher(config, process, spec)
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
        teacher=teacher and checks.as_teacher(teacher),
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
        teacher=teacher,
    )
    checks.check(experiment)
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
    workdir.find_run(folder, path)
    return _of_config(workdir.read_config(folder), f"{path}: the run in '{folder}'")


def _of_config(config: Mapping[str, Any], whose: str) -> Experiment:
    config = {**config, "guidance": {}, "evals": {}}
    config["logging"] = {**config["logging"], "samples_every": 0}
    config["checkpoint"] = {**config["checkpoint"], "best": "", "best_mode": ""}
    try:
        return build(config)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from None


def _teacher(
    config: Mapping[str, Any], process: Process, spec: DataSpec
) -> Experiment | None:
    """Builds the teacher's experiment out of the config that came with it.

    Raises:
      ValueError: the objective has no teacher, or the teacher is of another process or
        other data; says what differs.
    """
    block = config.get("teacher") or {}
    run, stored = block.get("run"), block.get("config")
    if not run:
        return None
    name = config["objective"]["name"]
    where = registry.target("objective", name, "config.objective")
    if "teacher" not in registry.parameters(where):
        raise ValueError(
            f"config.teacher: the objective '{name}' has no teacher; leave it out."
        )
    if not stored:
        raise ValueError(
            "config.teacher.config: missing; `inherit.inherit(config)` takes it from "
            f"'{run}'."
        )
    mesh, whose = config["mesh"], f"config.teacher: the run in '{run}'"
    teacher = _of_config({**stored, "mesh": mesh}, whose)
    check_same(teacher, process, spec, whose)
    if not hasattr(teacher.objective, "predict"):
        raise ValueError(f"{whose}: makes no predictions; it is no denoiser.")
    if getattr(teacher.objective, "input_noise", "none") != "none":
        raise ValueError(
            f"{whose}: is a student that answers for one draw of its input_noise, and "
            "is no denoiser; take its own teacher."
        )
    if block["ema"]:
        averages.check(teacher.ema, block["ema"], "config.teacher.ema")
    return teacher


def check_same(other: Experiment, process: Process, spec: DataSpec, whose: str) -> None:
    """Raises ValueError unless z_t and the label mean the same to both runs."""
    theirs = other.process
    pairs = {
        "process": (type(theirs).__name__, type(process).__name__),
        "process.schedule": tuple(
            getattr(p, "schedule", None) for p in (theirs, process)
        ),
        "process.noise": tuple(getattr(p, "noise", None) for p in (theirs, process)),
        "process.block_length": tuple(
            getattr(p, "block_length", 0) for p in (theirs, process)
        ),
        "number of tokens": tuple(
            getattr(p, "num_tokens", 0) for p in (theirs, process)
        ),
        "shape of the data": (other.spec.shape, spec.shape),
        "number of classes": (other.spec.num_classes, spec.num_classes),
    }
    for what, (there, here) in pairs.items():
        if there != here:
            raise ValueError(f"{whose} has another {what}: {there} there, {here} here.")


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
    whose = f"{path}.reference: the run in '{folder}'"
    check_same(other, experiment.process, experiment.spec, whose)
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
