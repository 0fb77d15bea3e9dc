"""Moment matching in parameter space: no auxiliary network, the teacher's gradient.

The auxiliary network of `moment_matching` becomes one small step of Adam that the
teacher would take on the student's samples. With x~, z_s and w as there, theta the
teacher's parameters and two independent batches a and b:

    G = grad_theta mean w mean_pixels (x~_a - x_theta(z_a, s_a))²                   (1)
    nu = -Lambda G,   Lambda = 1 / (sqrt(second moment) + 1e-8)                     (2)
    L = mean w mean_pixels x~_b sg[J nu]                                            (3)

with J the Jacobian of x_theta(z_b, s_b) in theta, so that J nu is one product in
forward mode. The gradient of (3) makes the student's samples ones on which the teacher
has no more to learn, as on data it has not. What is returned has x~_b - x_theta(z_b) in
place of x~_b, which changes no gradient; its mean is then

    1/2 (mean G)' Lambda (mean G)                                                   (4)

exactly, because a and b are independent, and falls to 0. One batch for both would add
the variance of G. Lambda is 1 where there are no moments ('identity').

A teacher can only tell apart what its parameters can: one with few, such as the exact
denoiser of a mixture, is at rest on samples that are far from the data.

Source: Salimans, Mensink, Heek and Hoogeboom 2024 (arXiv 2406.04103), algorithm 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, moment_matching
from diffusionlab.objectives.weightings import Weighting
from diffusionlab.samplers import grids
from diffusionlab.types import (
    Array,
    Batch,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Process,
    Teacher,
)

_EPSILON = 1e-8  # of Adam


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Returns every other example, and the rest, so that each device keeps its own.

    Raises:
      ValueError: the batch is of an odd number.
    """
    size = batch["x"].shape[0]
    if size % 2:
        raise ValueError(
            "config.data.batch_size: moment_matching_instant halves every batch (every "
            f"micro-batch, where there are some), so it must be even; got {size}."
        )
    even, odd = (lambda q: q[::2]), (lambda q: q[1::2])
    return jax.tree.map(even, batch), jax.tree.map(odd, batch)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MomentMatchingInstant:
    """Equation 3 for one role, `student`, that starts as the teacher.

    A step is 5 network evaluations per example of the batch, half of whose examples go
    through the teacher forward and backward, the other half through the student so and
    through the teacher in forward mode, which in the direction of parameters costs as
    much as backward. With a guided teacher it is 8.

    Attributes:
      process: how data become noise and what networks predict.
      networks: has the entry 'denoiser'.
      spec: shape and classes of the data.
      teacher: that is matched; differentiable in its parameters.
      weighting: see `MomentMatching`; that of the teacher's own training leaves it
        nothing to learn from data.
      num_steps, grid, times_option, posterior_noise, renoising, guidance_scale: see
        `MomentMatching`. The guided combination is differentiated; data are no
        stationary point of it.
      preconditioner: Lambda; 'adam' takes the second moments of the teacher's Adam, and
        with them the raw parameters, while the student starts from their average;
        'identity' is for a teacher without.

    Raises:
      ValueError: as `MomentMatching`; when traced, a batch of an odd number.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    weighting: Weighting
    num_steps: int = 8
    grid: grids.Grid | None = None
    times_option: str = "continuous"
    posterior_noise: float = 1.0
    renoising: str = "posterior"
    guidance_scale: float = 1.0
    preconditioner: str = "adam"

    samples_from = ("student",)
    roles, phases, phase = base.ROLES, base.phases, base.phase
    predict = base.predict_student
    check_sampler = moment_matching.check_sampler

    def __post_init__(self):
        moment_matching.check(self)
        base.check_word(self, "preconditioner", ("adam", "identity"))

    @property
    def needs_second_moment(self) -> bool:
        return self.preconditioner == "adam"

    @property
    def evaluations(self) -> Mapping[str, float]:
        teacher = base.teacher_evaluations(self)
        return {"train": 0.5 * (1.0 + 3.0 * teacher) + 0.5 * (3.0 + 3.0 * teacher)}

    def direction(self, params: Params, inputs: Inputs) -> tuple[Params, Array]:
        """Returns nu, and G' Lambda G, of the first half of the batch.

        Args:
          params: of the student; no gradient flows.
        """
        batch, _ = halves(inputs.batch)
        key, _ = base.split(inputs.key, 2)
        found = moment_matching.draw(self, params, batch, key)
        found = jax.lax.stop_gradient(found)

        def teacher_loss(theta):
            guess = base.teach(self, theta, found.z_s, found.s, found.cond).x
            return jnp.mean(found.weight * base.mean((found.x - guess) ** 2))

        gradient = jax.grad(teacher_loss)(inputs.params["teacher"])
        if self.needs_second_moment:
            nu = jax.tree.map(
                lambda g, moment: -g / (jnp.sqrt(moment) + _EPSILON),
                gradient,
                inputs.params["second_moment"],
            )
        else:
            nu = jax.tree.map(jnp.negative, gradient)
        products = jax.tree.map(lambda g, n: -jnp.sum(g * n), gradient, nu)
        square = sum(jax.tree.leaves(products), jnp.zeros(()))
        return jax.lax.stop_gradient((nu, square))

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3, its mean being equation 4, and its metrics.

        'teacher_grad_norm' is sqrt(G' Lambda G) of one half: above the square root of
        twice the loss by the noise of a batch. Only `params["student"]` has a gradient.
        """
        nu, square = self.direction(params["student"], inputs)
        _, batch = halves(inputs.batch)
        _, key = base.split(inputs.key, 2)
        found = moment_matching.draw(self, params["student"], batch, key)

        def answer(theta):
            return base.teach(self, theta, found.z_s, found.s, found.cond).x

        pair = jax.jvp(answer, (inputs.params["teacher"],), (nu,))
        taught, change = jax.lax.stop_gradient(pair)
        loss = found.weight * base.mean((found.x - taught) * change)
        return loss.mean(), {
            "loss": base.metric(loss),
            "loss_by_logsnr": base.by_logsnr(loss, self.process, found.s),
            "teacher_grad_norm": (jnp.sqrt(square), jnp.ones(())),
        }
