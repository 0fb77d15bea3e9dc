"""Whether the objects of an experiment fit each other: one line for what does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diffusionlab import registry, settings
from diffusionlab.guidance import base as guidance
from diffusionlab.samplers.inverse import is_deterministic
from diffusionlab.types import Sampler, Teacher

_MAX_SOBOL = 21201  # dimensions of scipy.stats.qmc.Sobol


def check(experiment: Any) -> None:
    """Checks the objects of an experiment against each other.

    Raises:
      ValueError: with the path of the offending key and what is accepted.
      FileNotFoundError: an evaluator names a file that is not there.
    """
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
    for name, network in experiment.networks.items():
        gives = getattr(experiment.objective, "gives_noise", False)
        if network.noise_input and not gives:
            raise ValueError(
                f"config.networks.{name}.noise_input: {network.noise_input}, but this "
                "objective gives no noise; leave it out."
            )
    trained = [name for name, role in roles.items() if role.trainable]
    if set(experiment.optim) != set(trained):
        raise ValueError(
            f"config.optim: has blocks for {sorted(experiment.optim)}, but the "
            f"objective trains {sorted(trained)}."
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
    check_process(experiment.objective, experiment, "config.objective")
    for name, evaluator in experiment.evals.items():
        _check_evaluator(experiment, evaluator, f"config.evals.{name}")
    _check_guidance(experiment)
    check_sampler(experiment.sampler, experiment, "config.sampler")
    if hasattr(experiment.objective, "check_sampler"):
        try:
            experiment.objective.check_sampler(experiment.sampler)
        except ValueError as error:
            raise ValueError(f"config.sampler.{error}") from None
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


def as_teacher(experiment: Any) -> Teacher:
    """Returns what an objective may use of the experiment of its teacher."""
    dropout = getattr(experiment.objective, "label_dropout", 0.0)
    has_null_label = bool(experiment.spec.num_classes) and dropout > 0
    of_its_own = getattr(experiment.objective, "teacher", None)
    inherited = of_its_own.cond if of_its_own else {}
    cond = getattr(experiment.objective, "cond", inherited)
    return Teacher(experiment.objective.predict, has_null_label, cond)


def check_process(thing: Any, experiment: Any, path: str) -> None:
    """Raises ValueError where an object is not for the process of an experiment.

    One for others than the gaussian process says so in `processes`.
    """
    known = getattr(thing, "processes", ("gaussian",))
    kind = getattr(experiment.process, "kind", "gaussian")
    if kind not in known:
        raise ValueError(
            f"{path}: {type(thing).__name__} is for the process "
            f"{' or '.join(known)}, and config.process is {kind}."
        )


def _check_evaluator(experiment: Any, evaluator: Any, path: str) -> None:
    check_process(evaluator, experiment, path)
    if experiment.spec.num_tokens and not getattr(evaluator, "takes_tokens", False):
        raise ValueError(
            f"{path}: {type(evaluator).__name__} measures numbers such as pixels, and "
            "the data are tokens."
        )
    predicts = hasattr(experiment.objective, "predict")
    if getattr(evaluator, "needs_predictions", True) and not predicts:
        raise ValueError(
            f"{path}: {type(evaluator).__name__} needs samples or predictions, and the "
            f"objective '{experiment.config['objective']['name']}' makes none; take "
            "'denoising_loss', which measures the loss on held-out data."
        )
    for sampler in _samplers(evaluator, path):
        check_sampler(sampler, experiment, f"{path}.sampler")
    try:
        if hasattr(evaluator, "check"):
            evaluator.check(experiment.train_source)
        if hasattr(evaluator, "check_process"):
            evaluator.check_process(experiment.process)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}.{error}") from None
    if getattr(evaluator, "needs_null_label", False):
        _check_null_label(experiment, path)
    size = math.prod(experiment.spec.shape)
    if getattr(evaluator, "sobol", False) and size > _MAX_SOBOL:
        raise ValueError(
            f"{path}.sobol: Sobol sequences have at most {_MAX_SOBOL} dimensions, and "
            f"the data {size}; use sobol=False."
        )
    if getattr(evaluator, "sobol", False) and not is_deterministic(
        experiment.sampler, experiment.process, experiment.spec.shape
    ):
        raise ValueError(
            f"{path}.sobol: the sampler draws noise at its steps, which no sequence of "
            "first noises can replace; take a deterministic one, such as 'ddim'."
        )


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


def check_sampler(sampler: Sampler, experiment: Any, path: str) -> None:
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
    check_process(sampler, experiment, path)
    try:
        sampler.times(experiment.process.schedule)
        if hasattr(sampler, "check"):
            sampler.check(experiment.process, experiment.spec)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    check_noise(sampler, experiment, path)


def check_noise(sampler: Sampler, experiment: Any, path: str) -> None:
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


def _check_null_label(experiment: Any, path: str) -> None:
    if not experiment.spec.num_classes:
        return
    if experiment.teacher is not None:
        raise ValueError(
            f"{path}: needs a prediction without a label, which a student does not "
            "learn; guide its teacher instead: config.objective.guidance_scale."
        )
    if not getattr(experiment.objective, "label_dropout", 1.0):
        raise ValueError(
            f"{path}: needs a prediction without a label, which "
            "config.objective.label_dropout=0 never trains."
        )


def _check_guidance(experiment: Any) -> None:
    for guide in experiment.guide:
        check_process(guide, experiment, "config.guidance")
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
