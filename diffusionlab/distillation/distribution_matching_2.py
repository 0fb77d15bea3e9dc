"""DMD2: distribution matching without pairs, with a discriminator, in several steps.

The gradient g of `distribution_matching` without its regression, and three changes:

1. The score network aux makes several steps for each one of the student.
2. A small head D, the role `discriminator`, sits on the features of aux and tells
   diffused data from diffused samples; with softplus(u) = log(1 + exp u),

       L_aux = L_score + discriminator_weight
               E[softplus(D(z_t of a sample)) + softplus(-D(z_t of data))]          (1)
       L_student = 1/2 mean (x - sg(x - g))² + gan_weight E[softplus(-D(z_t))]      (2)

   At the best D it is log p_data(z_t) / p_student(z_t). The student then learns from
   data what the teacher has wrong.
3. A student of k steps is trained on inputs that it makes itself, see `generator`.

What follows from sharing is a choice of this module: both terms of (1) train aux and
head together, the gradient of D going through the features into aux; D and the score
are asked at the same z_t, in one pass through aux; and in (2) the gradient of D goes
through aux into z_t and x, their parameters being fixed. Features are computed without
dropout.

Source: Yin et al. 2024, DMD2 (arXiv 2405.14867), sections 4.2 to 4.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, fake_score, generator
from diffusionlab.distillation.distribution_matching import direction, surrogate
from diffusionlab.types import (
    Array,
    Cond,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Prediction,
    Process,
    Role,
    Teacher,
    Times,
    lift,
)

HEAD = "discriminator"
"""Name of the role, and of its entry of `config.networks`."""

ROLES = {**fake_score.ROLES, HEAD: Role(HEAD, ema=())}


def check_head(objective: Any) -> None:
    """Raises ValueError unless the head takes what aux has as features.

    An objective without the network is left to the check of all networks.
    """
    if HEAD not in objective.networks:
        return
    net, head = (objective.networks[name] for name in (base.NETWORK, HEAD))

    def logits(key):
        label = base.labels(objective, {"label": jnp.zeros(1, jnp.int32)})
        cond = base.conditions(objective, jnp.zeros(1), label)
        z = jnp.zeros((1, *objective.spec.shape))
        _, features = net.features(net.init(key), z, cond)
        return head.apply(head.init(key), features, cond)

    jax.eval_shape(logits, jax.random.key(0))


def ask(
    objective: Any,
    params: Mapping[str, Params],
    z_t: Array,
    t: Array,
    cond: Cond,
) -> tuple[Array, Prediction, Array]:
    """Returns what aux and the head say at z_t, in one pass.

    Args:
      params: has those of aux and discriminator.

    Returns:
      raw: `[B, ...]`, the output of aux.
      prediction: `raw` as (x, eps).
      logits: D, `[B]`.
    """
    process, told = objective.process, base.conditions(objective, t, cond)
    net, head = (objective.networks[name] for name in (base.NETWORK, HEAD))
    seen = process.network_input(z_t, t)
    raw, features = net.features(params["aux"], seen, told)
    logits = head.apply(params[HEAD], features, told)
    return raw, process.predict(raw, z_t, t), logits


def discriminator_loss(real: Array, fake: Array) -> Array:
    """Returns the second term of equation 1 of each pair of logits, `[B]`."""
    return jax.nn.softplus(fake) + jax.nn.softplus(-real)


def aux_loss(
    objective: Any, params: Mapping[str, Params], inputs: Inputs
) -> tuple[Array, Metrics]:
    """Returns equation 1, and its metrics.

    'aux_loss' is its first term, 'discriminator_loss' the second without its weight;
    'discriminator_accuracy' is 1/2 where data and samples cannot be told apart.

    Args:
      objective: has the role of the head.
      params: of aux and discriminator.
      inputs: batch with 'x' `[B, ...]`, and 'label' for data with classes.
    """
    keys = base.split(inputs.key, 4)
    made, cond = fake_score.samples(
        objective, inputs.params["student"], keys[0], inputs
    )
    x, process = jax.lax.stop_gradient(made), objective.process
    t, weight = objective.times.sample(keys[1], x.shape[0], process.schedule)
    z_t, eps = process.corrupt(keys[2], x, t)
    raw, _, fake = ask(objective, params, z_t, t, cond)
    each = weight * fake_score.error(objective, x, eps, raw, t)
    z_real, _ = process.corrupt(keys[3], inputs.batch["x"], t)
    _, _, real = ask(objective, params, z_real, t, cond)
    apart = discriminator_loss(real, fake)
    right = 0.5 * ((real > 0).astype(jnp.float32) + (fake < 0))
    metrics = {
        "aux_loss": base.metric(each),
        "aux_loss_by_logsnr": base.by_logsnr(each, process, t),
        "discriminator_loss": base.metric(apart),
        "discriminator_accuracy": base.metric(right),
        "discriminator_accuracy_by_logsnr": base.by_logsnr(right, process, t),
    }
    return (each + objective.discriminator_weight * apart).mean(), metrics


def student_loss(
    objective: Any,
    params: Mapping[str, Params],
    inputs: Inputs,
    weigh: Callable[[Array], tuple[Array, Metrics]] | None = None,
) -> tuple[Array, Metrics]:
    """Returns equation 2, and its metrics.

    'loss' is its first term, 'gan_loss' the second without its weight, 'surrogate' a
    number with the gradient of the first and no meaning of its own.

    Args:
      objective: with the role of the head or without.
      params: of the student.
      inputs: labels of the batch are what is generated.
      weigh: logits `[B]` -> a factor on g of each example, and metrics.
    """
    keys, fixed = base.split(inputs.key, 4), jax.lax.stop_gradient(inputs.params)
    x, cond = fake_score.samples(
        objective, params["student"], keys[0], inputs, dropout=keys[1]
    )
    process = objective.process
    t = fake_score.between(keys[2], x.shape[0], objective.min_t, objective.max_t)
    z_t, _ = process.corrupt(keys[3], x, t)
    still = jax.lax.stop_gradient(z_t)
    taught = base.teach(objective, fixed["teacher"], still, t, cond).x
    metrics: Metrics = {}
    if HEAD in objective.roles:
        _, prediction, logits = ask(objective, fixed, z_t, t, cond)
        learned = jax.lax.stop_gradient(prediction.x)
        fooled = jax.nn.softplus(-logits)
        metrics["gan_loss"] = base.metric(jax.lax.stop_gradient(fooled))
    else:
        learned = base.apply(objective, fixed["aux"], still, t, cond).x
    g = direction(x, taught, learned)
    if weigh is not None:
        factor, found = weigh(jax.lax.stop_gradient(logits))
        g, metrics = lift(factor, g.ndim) * g, {**metrics, **found}
    each = surrogate(x, g)
    metrics |= {
        "loss": base.metric(0.5 * base.mean(g**2)),
        "surrogate": base.metric(jax.lax.stop_gradient(each)),
        **fake_score.report(objective, x, taught, learned, t),
    }
    if HEAD in objective.roles:
        each = each + objective.gan_weight * fooled
    return each.mean(), metrics


def evaluations(objective: Any) -> Mapping[str, float]:
    """Returns network evaluations by phase; the head's own are not counted."""
    head = HEAD in objective.roles
    student = fake_score.student_evaluations(objective)
    compared = base.teacher_evaluations(objective) + (2 if head else 1)
    return {
        "aux": objective.num_steps + (6.0 if head else 3.0),
        "student": student + compared,
    }


def phases(objective: Any) -> Mapping[str, Phase]:
    """Returns the two phases of an objective with a head."""
    return {
        "aux": Phase(("aux", HEAD), lambda *given: aux_loss(objective, *given)),
        "student": Phase(("student",), objective.loss),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DistributionMatching2:
    """Equations 1 and 2: `aux_steps` steps of aux and head, then one of the student.

    A student of k steps takes k evaluations for its samples and 2 more for the gradient
    of the last of them. Phase 'aux': k + 6; k + 3 without the head. Phase 'student':
    k + 2, one of the teacher (two where it is guided), one of aux, and one more for the
    gradient of D with respect to z_t.

    Attributes:
      process, networks, spec, teacher: of the experiment; the network `discriminator`
        is the head.
      times: law of the noise levels in equation 1.
      num_steps: k.
      first_logsnr: noise level that samples start from; the default is sigma / alpha =
        80.
      aux_steps: steps of aux for each of the student.
      guidance_scale: of the teacher; aux is not guided. 1 is off.
      min_t, max_t: ends of the times of equation 2.
      gan_weight: in equation 2; with 0 there is no head, and no role for it.
      discriminator_weight: in equation 1.

    Raises:
      ValueError: see `fake_score.check`; an interval of times that is none; negative
        weights; a head that does not fit the features of aux.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    num_steps: int = 4
    first_logsnr: float = -8.764
    aux_steps: int = 5
    guidance_scale: float = 1.0
    min_t: float = 0.02
    max_t: float = 0.98
    gan_weight: float = 3e-3
    discriminator_weight: float = 1e-2

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = generator.check_sampler
    evaluations = property(evaluations)

    def __post_init__(self):
        fake_score.check(self)
        fake_score.check_interval(self)
        base.check_at_least(self, 0, "gan_weight", "discriminator_weight")
        if self.gan_weight:
            check_head(self)

    @property
    def roles(self) -> Mapping[str, Role]:
        return ROLES if self.gan_weight else fake_score.ROLES

    @property
    def phases(self) -> Mapping[str, Phase]:
        return phases(self) if self.gan_weight else fake_score.phases(self)

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then 'student' for one."""
        return base.turns(step, self.aux_steps)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 and its metrics; see `student_loss`."""
        return student_loss(self, params, inputs)
