"""A resolved config becomes an `Experiment`: every object built and cross-checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusionlab import guidance, registry, settings
from diffusionlab.models import network
from diffusionlab.types import DataSpec, Network, Objective, Process, Sampler, Source


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Everything a run is made of; holds no arrays.

    Attributes:
      config: the resolved config.
      train_source, test_source: what is trained on, and what is held out.
      guide: the guidance transforms, in the order of the registry.
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

    @property
    def seed(self) -> int:
        return self.config["seed"]


def _in_registry_order(kind: str, blocks: Mapping[str, Any], path: str) -> tuple:
    """Builds blocks named by their key; plug-ins come after registered ones."""
    known = list(registry.table(kind))
    order = sorted(
        blocks, key=lambda n: (known.index(n) if n in known else len(known), n)
    )
    return tuple(
        registry.build(kind, {"name": name, **blocks[name]}, f"{path}.{name}")
        for name in order
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
    return experiment


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
        if hasattr(evaluator, "check"):
            try:
                evaluator.check(experiment.train_source)
            except ValueError as error:
                raise ValueError(f"config.evals.{name}.{error}") from None
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


def check_sampler(sampler: Sampler, experiment: Experiment, path: str) -> None:
    """Raises ValueError where a sampler cannot work for this process and these data.

    One that does not suit all of them has `check(process, spec)`, which raises it.
    """
    try:
        sampler.times(experiment.process.schedule)
        if hasattr(sampler, "check"):
            sampler.check(experiment.process, experiment.spec)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None


def _check_guidance(experiment: Experiment) -> None:
    try:
        guidance.compose(
            experiment.guide, lambda *_: None, experiment.process, experiment.spec
        )
    except ValueError as error:
        raise ValueError(f"config.guidance: {error}") from None
    scales = [getattr(guide, "guidance_scale", 1.0) for guide in experiment.guide]
    if scales != [1.0] * len(scales) and not getattr(
        experiment.objective, "label_dropout", 1.0
    ):
        raise ValueError(
            "config.guidance: needs a prediction without a label, which "
            "config.objective.label_dropout=0 never trains."
        )
