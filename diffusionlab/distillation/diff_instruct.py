"""Diff-Instruct: the student's score is pushed onto the teacher's, at its own samples.

A generator x = g(z) is trained on the integral over noise levels of the reverse KL
divergence, of the student's noisy marginals p_t to the teacher's q_t. Its gradient is

    d KL(p_t, q_t) = E[ alpha (score_p - score_q)(z_t) dg ],   z_t = alpha x + sigma eps
                   = E[ (alpha / sigma)² (x_hat_aux - x_hat_teacher) dg ]           (1)

with an auxiliary network that learns the student's samples. Weighted by
(sigma / alpha)², the student minimises the surrogate

    mean_B sum_pixels sg[x_hat_aux - x_hat_teacher] x                               (2)

whose value says nothing: the metric 'loss' is the mean square of the bracket. Reverse
KL seeks modes: a student may leave some out, see `em_distillation` for the cure.

The paper scales the noise of EDM, z_t / alpha, by a fixed level sigma / alpha and tells
the network that level. Here it is the process's own prior at that level, which counts
the data's variance in, too.

Source: Luo et al. 2023 (arXiv 2305.18455), algorithm 1; the surrogate is in the space
of x with weight 1 as in its published program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from diffusionlab.distillation import base, fake_score, generator
from diffusionlab.types import (
    Array,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Role,
    Teacher,
    Times,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiffInstruct:
    """Equation 2 for `student`, denoising of its samples for `aux`, in turns.

    Network evaluations of a step: 'aux' num_steps + 3, as the samples are drawn first;
    'student' num_steps + 4, of which 3 are forward and backward, and one more with a
    guided teacher. No data but the labels.

    Attributes:
      process: how data become noise.
      networks: has the entry 'denoiser', of student and aux.
      spec: shape and classes of the data.
      teacher: whose score is the goal.
      times: law of the noise levels, of both phases.
      num_steps: of the generator, see `generator.py`.
      first_logsnr: at which it starts; 0 is the paper's sigma_init of 1.
      aux_steps: of aux before each of the student; 1 is the paper's.
      guidance_scale: of the teacher; 1 is off. Aux is never guided.

    Raises:
      ValueError: no teacher, one that cannot be guided, or numbers out of range.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    num_steps: int = 1
    first_logsnr: float = 0.0
    aux_steps: int = 1
    guidance_scale: float = 1.0

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = generator.check_sampler

    def __post_init__(self):
        fake_score.check(self)

    @property
    def roles(self) -> Mapping[str, Role]:
        return fake_score.ROLES

    @property
    def phases(self) -> Mapping[str, Phase]:
        return fake_score.phases(self)

    @property
    def evaluations(self) -> Mapping[str, float]:
        student = fake_score.student_evaluations(self)
        compared = base.teacher_evaluations(self) + 1
        return {"aux": self.num_steps + 3.0, "student": student + compared}

    def phase(self, step: int) -> str:
        """Returns 'aux', or 'student' after every `aux_steps` of it."""
        return base.turns(step, self.aux_steps)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2, and its metrics; see also `fake_score.report`.

        Teacher and aux are asked without dropout, so that their difference has no
        noise of it.

        Args:
          params: by role.
          inputs: labels of the batch are what is generated.
        """
        keys, process = base.split(inputs.key, 4), self.process
        x, cond = fake_score.samples(
            self, params["student"], keys[0], inputs, dropout=keys[1]
        )
        t, weight = self.times.sample(keys[2], x.shape[0], process.schedule)
        z_t, _ = process.corrupt(keys[3], jax.lax.stop_gradient(x), t)
        taught = base.teach(self, inputs.params["teacher"], z_t, t, cond).x
        learned = base.apply(self, inputs.params["aux"], z_t, t, cond).x
        push = jax.lax.stop_gradient(learned - taught)
        each = weight * base.total(push * x)
        metrics = fake_score.report(self, x, taught, learned, t)
        metrics["loss"] = metrics["score_difference"]
        metrics["surrogate"] = base.metric(jax.lax.stop_gradient(each))
        return each.mean(), metrics
