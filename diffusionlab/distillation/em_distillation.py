"""EM distillation: maximum likelihood for generators, by Langevin steps in z and eps.

The noise a generator starts from is a latent variable, z ~ N(0, I) for x = g(z), and
p(z_t | z) = N(alpha g(z), sigma² I) at every noise level. Its likelihood of the
teacher's noisy data q_t is maximised, E_q[log p_t]: forward KL, which covers modes.
With z_t = alpha g(z) + sigma eps, the E-step draws (eps, z) from

    rho(eps, z) ∝ (q_t / p_t)(z_t) N(eps; 0, I) N(z; 0, I)                          (1)

by K steps of the unadjusted Langevin algorithm that start at the student's own pairs,

    eps <- eps + gamma_eps (sigma D - eps) + sqrt(2 gamma_eps) n
    z   <- z + gamma_z (alpha J^T D - z) + sqrt(2 gamma_z) m                        (2)

with D = score_teacher - score_aux at z_t and J the Jacobian of g. The M-step regresses
the generator, at the latent where the chain ended, on what the chain says:

    L = w / (2 sigma²) |sg[alpha g(z) + sigma r] - alpha g(z)|²,
    -dL/dg = w (alpha / sigma) r,    w = (sigma / alpha)^noise_power                (3)

Most of the last eps is noise. As eps is linear in all that the chain added, the
teacher's part of it is known, and the noise can be cancelled in the residual r:

    drift <- (1 - gamma_eps) drift + gamma_eps sigma D,   from 0                    (4)
    none   r = eps
    chain  r = drift + (1 - gamma_eps)^K eps_0   without the noise n of the chain
    plain  r = eps - eps_0 - sqrt(2 gamma_eps) sum n, without decay
    full   r = drift                             without all noise                  (5)

Which of them the paper takes is not known to us; `full` is zero for every example of a
student that matches, and its bias in a gaussian test is about 1 %.

K = 1 with gamma_z = 0 and `full` is Diff-Instruct times gamma_eps, so K leads from
reverse KL to forward KL. K = 0 stands for the limit of that, r = sigma D at the
student's own pair: with noise_power 2 it is `diff_instruct` itself.

Source: Xie et al. 2024 (arXiv 2405.16852). Ours: the names of (5), several chains, K by
step, and generators of more than one step, where z is the noise of the step trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

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
    Teacher,
    Times,
    lift,
)


class Chain(NamedTuple):
    """Where Langevin steps led; `[B, ...]` each.

    Attributes:
      z, eps: after the last step.
      drift: equation 4.
      first_force: sigma D at the first step.
      first_eps: before it.
      remains: scalar, (1 - gamma_eps)^K, the share of first_eps in eps.
      noise: sqrt(2 gamma_eps) sum n.
    """

    z: Array
    eps: Array
    drift: Array
    first_force: Array
    first_eps: Array
    remains: Array
    noise: Array


CANCELLATIONS: dict[str, Callable[[Chain], Array]] = {
    "none": lambda chain: chain.eps,
    "chain": lambda chain: chain.drift + chain.remains * chain.first_eps,
    "plain": lambda chain: chain.eps - chain.first_eps - chain.noise,
    "full": lambda chain: chain.drift,
}
"""Equation 5."""


def langevin(
    sample: Callable[[Array], Array],
    pull: Callable[[Array], Array],
    z: Array,
    eps: Array,
    draw: Callable[[Array], tuple[Array, Array]],
    *,
    alpha: Array,
    sigma: Array,
    gamma_eps: float,
    gamma_z: float,
    num_steps: int,
) -> Chain:
    """Returns where `num_steps` >= 1 steps of equation 2 lead.

    Nothing is kept of a step, since nobody differentiates through it.

    Args:
      sample: g, z `[B, ...]` -> x; differentiated in z unless gamma_z is 0.
      pull: z_t `[B, ...]` -> sigma D.
      z, eps: `[B, ...]` the student's own pairs.
      draw: number of a step -> the standard normal n and m of equation 2.
      alpha, sigma: `[B]`.
    """
    alpha, sigma = (lift(q, eps.ndim) for q in (alpha, sigma))

    def step(chain: Chain, index: Array) -> tuple[Chain, None]:
        eps_noise, z_noise = draw(index)
        x, pull_back = jax.vjp(sample, chain.z) if gamma_z else still
        force = pull(alpha * x + sigma * chain.eps)
        noise = jnp.sqrt(2 * gamma_eps) * eps_noise
        z = chain.z
        if gamma_z:
            (z_force,) = pull_back(alpha / sigma * force)
            z = (1 - gamma_z) * z + gamma_z * z_force
            z += jnp.sqrt(2 * gamma_z) * z_noise
        return chain._replace(
            z=z,
            eps=(1 - gamma_eps) * chain.eps + gamma_eps * force + noise,
            drift=(1 - gamma_eps) * chain.drift + gamma_eps * force,
            first_force=jnp.where(index == 0, force, chain.first_force),
            remains=(1 - gamma_eps) * chain.remains,
            noise=chain.noise + noise,
        ), None

    # Without steps in z, the samples stay what they are.
    still = None if gamma_z else (sample(z), None)
    zeros = jnp.zeros_like(eps)
    begin = Chain(z, eps, zeros, zeros, eps, jnp.ones(()), zeros)
    chain, _ = jax.lax.scan(step, begin, jnp.arange(num_steps))
    return jax.lax.stop_gradient(chain)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EmDistillation:
    """Equation 3 for `student`, denoising of its samples for `aux`, in turns.

    Network evaluations of a step, for a generator of k steps: 'aux' k + 3, as samples
    are drawn first; 'student' k - 1 + num_chains (4 K + 3), a Langevin step being one
    of the generator and one back through it, one of the teacher and one of aux; k + 4
    for K = 0. A guided teacher takes one more each time, gamma_z = 0 two less in a
    Langevin step. No data but the labels.

    Phases: 'aux', and 'student'; with a `langevin_schedule` one for each of its K,
    'student_<K>'.

    Attributes:
      process: how data become noise.
      networks: has the entry 'denoiser', of student and aux.
      spec: shape and classes of the data.
      teacher: whose samples are to become likely.
      times: law of the noise levels of both phases.
      num_steps: k, see `generator.py`; the paper's is 1.
      first_logsnr: at which the generator starts; -6 in the paper for images.
      num_langevin_steps: K.
      langevin_schedule: pairs (step, K): from that optimiser step on, K steps in place
        of `num_langevin_steps`.
      num_chains: chains from each of the student's pairs, over which (3) is averaged.
      gamma_eps, gamma_z: step sizes; J is stiff, and gamma_z far smaller in the paper.
      cancellation: 'none', 'chain', 'plain' or 'full', equation 5.
      noise_power: of w in equation 3: 2, 1 or 0 in the literature.
      aux_steps: of aux before each of the student.
      guidance_scale: of the teacher; 1 is off. Aux is never guided.

    Raises:
      ValueError: see `fake_score.check`; step sizes outside [0, 1); another word for
        `cancellation`, or one but 'full' with K = 0; a schedule that is none.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    times: Times
    num_steps: int = 1
    first_logsnr: float = -6.0
    num_langevin_steps: int = 8
    langevin_schedule: tuple = ()
    num_chains: int = 1
    gamma_eps: float = 0.16
    gamma_z: float = 0.000016
    cancellation: str = "full"
    noise_power: float = 2.0
    aux_steps: int = 1
    guidance_scale: float = 1.0

    samples_from = ("student",)
    predict = base.predict_student
    check_sampler = generator.check_sampler

    def __post_init__(self):
        fake_score.check(self)
        base.check_at_least(self, 1, "num_chains")
        if not 0 < self.gamma_eps < 1 or not 0 <= self.gamma_z < 1:
            raise ValueError(
                "gamma_eps: must be in (0, 1), and gamma_z in [0, 1), got "
                f"{self.gamma_eps} and {self.gamma_z}."
            )
        if self.cancellation not in CANCELLATIONS:
            raise ValueError(
                f"cancellation: expected one of {', '.join(CANCELLATIONS)}, got "
                f"{self.cancellation!r}."
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        pairs = self.langevin_schedule
        if not all(
            isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
        ) or sorted({step for step, _ in pairs}) != [step for step, _ in pairs]:
            raise ValueError(
                "langevin_schedule: expected pairs (step, number of Langevin steps) "
                f"with rising steps, got {pairs}."
            )
        numbers = self._numbers()
        if min(numbers) < 0:
            raise ValueError(
                f"num_langevin_steps: must be at least 0, got {min(numbers)}."
            )
        if not min(numbers) and (self.cancellation != "full" or self.num_chains > 1):
            raise ValueError(
                "num_langevin_steps: 0 has no chain, so that nothing but "
                f"cancellation='full' and num_chains=1 has a meaning, got "
                f"{self.cancellation!r} and {self.num_chains}."
            )

    def _numbers(self) -> list[int]:
        """Returns every K there is."""
        found = {number for _, number in self.langevin_schedule}
        if not self.langevin_schedule or self.langevin_schedule[0][0] > 0:
            found.add(self.num_langevin_steps)
        return sorted(found)

    @property
    def roles(self) -> Mapping[str, Role]:
        return fake_score.ROLES

    @property
    def phases(self) -> Mapping[str, Phase]:
        phases = {"aux": fake_score.phases(self)["aux"]}
        for number in self._numbers():
            loss = functools.partial(self.loss, num_langevin_steps=number)
            phases[self._name(number)] = Phase(("student",), loss)
        return phases

    @property
    def evaluations(self) -> Mapping[str, float]:
        scores = base.teacher_evaluations(self) + 1
        step = scores + (2 if self.gamma_z else 0)
        found = {"aux": self.num_steps + 3.0}
        for number in self._numbers():
            chains = self.num_chains * (number * step + 3)
            found[self._name(number)] = (
                self.num_steps - 1 + (chains if number else scores + 3)
            )
        return found

    def _name(self, number: int) -> str:
        return f"student_{number}" if self.langevin_schedule else "student"

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then the student's of that time."""
        if base.turns(step, self.aux_steps) == "aux":
            return "aux"
        past = [number for start, number in self.langevin_schedule if start <= step]
        return self._name(past[-1] if past else self.num_langevin_steps)

    def loss(
        self,
        params: Mapping[str, Params],
        inputs: Inputs,
        num_langevin_steps: int | None = None,
    ) -> tuple[Array, Metrics]:
        """Returns equation 3, and its metrics; see also `fake_score.report`.

        'loss' is the mean square of x_teacher - x_aux at the student's own pairs, which
        goes to zero. 'surrogate' is the value of (3), 'residual' and 'drift' the mean
        squares of r and of equation 4, 'z_norm2' that of the last z: 1, unless gamma_z
        is too large.

        Args:
          params: by role.
          inputs: labels of the batch are what is generated.
          num_langevin_steps: K; None is the objective's.
        """
        number = num_langevin_steps
        number = self.num_langevin_steps if number is None else number
        keys, process = base.split(inputs.key, 5), self.process
        shape, cond = inputs.batch["x"].shape, base.labels(self, inputs.batch)
        frozen = inputs.params["student"]
        start = generator.start(self, frozen, keys[0], shape, cond)
        cond = generator.told(self, start, cond)
        t, weight = self.times.sample(keys[2], shape[0], process.schedule)
        eps = jax.random.normal(keys[3], shape)
        start, cond, t, weight, eps = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, self.num_chains, axis=0),
            (start, cond, t, weight, eps),
        )
        alpha, sigma = process.schedule.alpha_sigma(t)

        def pull(z_t: Array) -> Array:
            taught = base.teach(self, inputs.params["teacher"], z_t, t, cond)
            learned = base.apply(self, inputs.params["aux"], z_t, t, cond)
            return generator.score_gap(process, taught, learned, t)

        def draw(index: Array) -> tuple[Array, Array]:
            pair = jax.random.split(jax.random.fold_in(keys[4], index))
            return tuple(jax.random.normal(key, eps.shape) for key in pair)

        if number:
            chain = langevin(
                lambda z: generator.generate(
                    self, frozen, start._replace(noise=z), cond
                ),
                pull,
                start.noise,
                eps,
                draw,
                alpha=alpha,
                sigma=sigma,
                gamma_eps=self.gamma_eps,
                gamma_z=self.gamma_z,
                num_steps=number,
            )
            start = start._replace(noise=chain.z)
            force, drift = chain.first_force, chain.drift
            residual = CANCELLATIONS[self.cancellation](chain)
        x = generator.generate(self, params["student"], start, cond, keys[1])
        own = jax.lax.stop_gradient(x)
        if not number:
            force = drift = residual = jax.lax.stop_gradient(
                pull(process.mix(own, eps, t))
            )
        ratio = jnp.exp(0.5 * process.schedule.logsnr(t))
        # Equation 3 in units of sigma: alpha / sigma is large, and x - own is 0.
        error = residual + lift(ratio, x.ndim) * (own - x)
        each = 0.5 * weight * ratio**-self.noise_power * base.total(error**2)
        difference = force / lift(ratio, x.ndim)
        metrics = fake_score.report(self, own, jnp.zeros_like(own), difference, t)
        metrics |= {
            "loss": metrics["score_difference"],
            "surrogate": base.metric(jax.lax.stop_gradient(each)),
            "residual": base.metric(base.mean(residual**2)),
            "drift": base.metric(base.mean(drift**2)),
            "z_norm2": base.metric(base.mean(start.noise**2)),
        }
        return each.mean(), metrics
