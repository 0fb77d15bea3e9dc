"""Distribution matching under any f-divergence: DMD2 with a weight on every sample.

With the density ratio r = p_teacher(z_t) / p_student(z_t), the gradient of
E_student[f(r)] is that of the reverse KL divergence with each sample weighted by

    h(r) = f''(r) r²                                                                (1)

    reverse_kl            1                 f = -log r
    forward_kl            r                 r log r
    jensen_shannon        r / (1 + r)       r log r - (1 + r) log((1 + r) / 2)
    softened_reverse_kl   1 / (1 + r)       (1 + r) log((1 + r) / r)
    neyman                1 / r             (1 - r)² / (2 r)
    squared_hellinger     sqrt r            -4 sqrt r
    jeffreys              1 + r             (r - 1) log r

r comes from the discriminator of DMD2, log r = D(z_t) within +-10, and r within
[0.1, 20]. h is divided by its mean over the batch, so factors of f do not matter, and
reverse_kl is DMD2. A divergence that weighs by r hunts for what the student lacks; one
that weighs by 1 / r, for what it makes too often.

The paper divides r by its running mean in bins of time on some data sets; that is left
out, being state that is no parameter.

Source: Xu, Nie and Vahdat 2025, f-distill (arXiv 2502.15681), theorem 1 and table 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from diffusionlab.distillation import (
    base,
    distribution_matching_2,
    fake_score,
    generator,
)
from diffusionlab.types import (
    Array,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Teacher,
    Times,
)

WEIGHTS = {
    "reverse_kl": jnp.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "squared_hellinger": jnp.sqrt,
    "jeffreys": lambda r: 1 + r,
}
"""Divergence -> h(r) of equation 1, up to a constant factor."""

_MAX_LOGIT = 10.0
_SMALLEST, _LARGEST = 0.1, 20.0


def density_ratio(logits: Array) -> Array:
    """Returns r of teacher over student, in [0.1, 20], of logits of any shape."""
    inside = jnp.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)
    return jnp.clip(jnp.exp(inside), _SMALLEST, _LARGEST)


def weight(divergence: str, logits: Array) -> Array:
    """Returns h(r) over its mean over the batch, `[B]`, of logits `[B]`."""
    h = WEIGHTS[divergence](density_ratio(logits))
    return h / h.mean()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FDivergence:
    """Equations 1 and 2 of `distribution_matching_2`, with g times h(r).

    The cost is that of DMD2 with its head. Phase 'aux': k + 6. Phase 'student': k + 2,
    one of the teacher (two where it is guided), one of aux, and one more for the
    gradient of D with respect to z_t; that one is spent with gan_weight 0, too.

    Attributes:
      process, networks, spec, teacher: of the experiment; the network `discriminator`
        is the head.
      times: law of the noise levels at which aux and head are trained.
      divergence: one of the table.
      num_steps: k.
      first_logsnr: noise level that samples start from; the default is sigma / alpha =
        80.
      aux_steps: steps of aux for each of the student.
      guidance_scale: of the teacher; aux is not guided. 1 is off.
      min_t, max_t: ends of the times of the student's loss.
      gan_weight: of the adversarial term; with 0 the head gives the weights alone.
      discriminator_weight: of the head's loss.

    Raises:
      ValueError: another divergence; see `DistributionMatching2` for the others.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    divergence: str = "jensen_shannon"
    num_steps: int = 1
    first_logsnr: float = -8.764
    aux_steps: int = 5
    guidance_scale: float = 1.0
    min_t: float = 0.02
    max_t: float = 0.98
    gan_weight: float = 3e-3
    discriminator_weight: float = 1e-2

    samples_from = ("student",)
    roles = distribution_matching_2.ROLES
    predict = base.predict_student
    check_sampler = generator.check_sampler
    evaluations = property(distribution_matching_2.evaluations)

    def __post_init__(self):
        fake_score.check(self)
        fake_score.check_interval(self)
        base.check_at_least(self, 0, "gan_weight", "discriminator_weight")
        if self.divergence not in WEIGHTS:
            raise ValueError(
                f"divergence: expected one of {', '.join(WEIGHTS)}, got "
                f"{self.divergence!r}."
            )
        distribution_matching_2.check_head(self)

    @property
    def phases(self) -> Mapping[str, Phase]:
        return distribution_matching_2.phases(self)

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then 'student' for one."""
        return base.turns(step, self.aux_steps)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns the student's loss, and the metrics of DMD2 and two more.

        'density_ratio' is r; 'ratio_at_its_ends' the share of samples where it is
        clipped: near 1 the head sees two things that do not overlap, and h says little.
        """

        def weigh(logits):
            r = density_ratio(logits)
            ends = (r <= _SMALLEST) | (r >= _LARGEST)
            metrics = {
                "density_ratio": base.metric(r),
                "ratio_at_its_ends": base.metric(ends.astype(jnp.float32)),
            }
            return weight(self.divergence, logits), metrics

        return distribution_matching_2.student_loss(self, params, inputs, weigh)
