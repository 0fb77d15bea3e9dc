"""Distribution matching (DMD): samples follow the difference of two scores.

A generator x = G(noise) is moved along the gradient of the reverse KL divergence of its
diffused samples to the teacher's. With z_t from x, t ~ U(min_t, max_t):

    g = (x_aux(z_t) - x_teacher(z_t)) / mean|x - x_teacher(z_t)|                    (1)
    L = 1/2 mean (x - sg(x - g))²                                                   (2)

so dL/dx = g / size: g is the difference of the scores times sigma² / alpha, brought to
one size at every noise level. The role `aux` learns the score of the samples, see
`fake_score`. The paper's formula has one more factor alpha in (1), its published
program has not; this is the program's.

On stored pairs (noise, y) of the teacher's probability-flow ODE the student may learn
the map itself as well, which keeps modes that the reverse KL alone may lose:

    L + regression_weight mean distance(G(noise), y)                                (3)

The paper's distance is LPIPS, which needs weights of its own and is left out; here it
is the squared error or the pseudo-Huber distance.

Source: Yin et al. 2024, DMD (arXiv 2311.18828), equations 7 and 8 and section 3.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

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
    Sampler,
    Teacher,
    Times,
    lift,
)

_SMALLEST = 1e-6
"""Below it the size of x - x_teacher is not divided out: a sample the teacher keeps."""

_HUBER = 0.00054  # of consistency training, Song and Dhariwal 2023, arXiv 2310.14189


def direction(x: Array, taught: Array, learned: Array) -> Array:
    """Returns g of equation 1, `[B, ...]`, without a gradient.

    Args:
      x: `[B, ...]` samples of the student.
      taught, learned: `[B, ...]` x of the teacher and of aux at z_t.
    """
    size = jnp.maximum(base.mean(jnp.abs(x - taught)), _SMALLEST)
    return jax.lax.stop_gradient((learned - taught) / lift(size, x.ndim))


def surrogate(x: Array, g: Array) -> Array:
    """Returns `[B]` numbers whose gradient is that of equation 2, g / size.

    Their value is not: x - (x - g) loses the digits of a small g.
    """
    return base.mean(x * jax.lax.stop_gradient(g))


def squared(a: Array, b: Array) -> Array:
    """Returns the mean squared error of each example, `[B]`."""
    return base.mean((a - b) ** 2)


def pseudo_huber(a: Array, b: Array) -> Array:
    """Returns sqrt(mean (a - b)² + h²) - h of each example, `[B]`; h = 0.00054."""
    return jnp.sqrt(squared(a, b) + _HUBER**2) - _HUBER


DISTANCES = {"squared": squared, "pseudo_huber": pseudo_huber}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DistributionMatching:
    """Equations 1 to 3: `aux_steps` steps of aux, then one of the student.

    A student of k steps takes k evaluations for its samples and 2 more for the gradient
    of the last of them. Phase 'aux': k + 3. Phase 'student': k + 2, one of the teacher
    (two where it is guided), one of aux, and 3 more on pairs.

    Attributes:
      process, networks, spec, teacher: of the experiment.
      times: law of the noise levels that aux learns; it should have all of those that
        the student is compared at.
      num_steps: k.
      first_logsnr: noise level that samples start from; the default is sigma / alpha =
        80.
      aux_steps: steps of aux for each of the student.
      guidance_scale: of the teacher; aux is not guided. 1 is off.
      min_t, max_t: ends of the times of equation 1.
      regression_weight: of equation 3; for k = 1 alone, since pairs say nothing about
        the steps in between.
      regression_pairs: how many pairs are stored; they are then the data.
      distance: 'squared' or 'pseudo_huber'.
      sampler: of the teacher's pairs; a deterministic one.

    Raises:
      ValueError: see `fake_score.check`; an interval of times that is none; another
        distance; a regression with more than one step or without pairs.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    num_steps: int = 1
    first_logsnr: float = -8.764
    aux_steps: int = 1
    guidance_scale: float = 1.0
    min_t: float = 0.02
    max_t: float = 0.98
    regression_weight: float = 0.25
    regression_pairs: int = 10000
    distance: str = "squared"
    sampler: Sampler | None = None

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = generator.check_sampler

    def __post_init__(self):
        fake_score.check(self)
        fake_score.check_interval(self)
        base.check_at_least(self, 0, "regression_weight")
        if self.distance not in DISTANCES:
            raise ValueError(
                f"distance: expected one of {', '.join(DISTANCES)}, got "
                f"{self.distance!r}."
            )
        if not self.regression_weight:
            return
        base.check_at_least(self, 1, "regression_pairs")
        if self.num_steps > 1:
            raise ValueError(
                "regression_weight: pairs of noise and sample train a single step, "
                f"and num_steps is {self.num_steps}; use 0."
            )
        if self.sampler is None:
            raise ValueError(
                "sampler: missing; it draws the teacher's pairs, such as "
                "{'name': 'ddim', 'num_steps': 64}."
            )

    @property
    def num_pairs(self) -> int:
        """How many pairs the teacher has to draw; 0 trains on ordinary data."""
        return self.regression_pairs if self.regression_weight else 0

    @property
    def evaluations(self) -> Mapping[str, float]:
        student = fake_score.student_evaluations(self)
        compared = base.teacher_evaluations(self) + 1
        pairs = 3 if self.regression_weight else 0
        return {"aux": self.num_steps + 3.0, "student": student + compared + pairs}

    @property
    def roles(self) -> Mapping[str, Role]:
        return fake_score.ROLES

    @property
    def phases(self) -> Mapping[str, Phase]:
        return fake_score.phases(self)

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then 'student' for one."""
        return base.turns(step, self.aux_steps)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 3 for the student, and its metrics.

        'loss' is the value of equation 3, 'surrogate' a number with the gradient of
        equation 2 and no meaning of its own; see `fake_score.report` for others.

        Args:
          params: by role.
          inputs: labels of the batch are what is generated; with pairs it has the
            teacher's sample 'x' and the standard normal 'noise' that it came from.
        """
        keys, fixed = base.split(inputs.key, 5), jax.lax.stop_gradient(inputs.params)
        x, cond = fake_score.samples(
            self, params["student"], keys[0], inputs, dropout=keys[1]
        )
        t = fake_score.between(keys[2], x.shape[0], self.min_t, self.max_t)
        z_t, _ = self.process.corrupt(keys[3], jax.lax.stop_gradient(x), t)
        taught = base.teach(self, fixed["teacher"], z_t, t, cond).x
        learned = base.apply(self, fixed["aux"], z_t, t, cond).x
        g = direction(x, taught, learned)
        each, value = surrogate(x, g), 0.5 * base.mean(g**2)
        metrics = fake_score.report(self, x, taught, learned, t)
        metrics["surrogate"] = base.metric(jax.lax.stop_gradient(each))
        if self.regression_weight:
            far = self._regression(params["student"], inputs, cond, keys[4])
            each, value = each + far, value + far
            metrics["regression"] = base.metric(far / self.regression_weight)
        return each.mean(), {**metrics, "loss": base.metric(value)}

    def _regression(self, params, inputs: Inputs, cond, key: Array) -> Array:
        """Returns the second term of equation 3, `[B]`."""
        noise, target = (inputs.batch[name] for name in ("noise", "x"))
        t = generator.times(self)[0]
        size = noise.shape[:1]
        start = generator.Start(
            jnp.zeros_like(noise),
            jnp.full(size, self.process.prior_std(t)),
            noise,
            jnp.full(size, t),
        )
        made = generator.generate(self, params, start, cond, key)
        return self.regression_weight * DISTANCES[self.distance](made, target)
