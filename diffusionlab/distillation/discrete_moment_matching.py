"""Discrete moment matching: a sampler of tokens of a few steps, from one of many.

From noised data z_t the student answers a distribution p = p_student(x | z_t, n) of
each token, n being noise that it is given besides. A draw x of p takes a step of the
sampler to an earlier s, z_s ~ q(z_s | z_t, x). An auxiliary denoiser learns the tokens
of the student's z_s, in turns with the student; with y the drawn x, and sums over the
positions i that are noise in z_s (masked, or all) and the tokens k,

    L_aux = -w(s) sum_ik (y + p_teacher(z_s, s))_ik log p_aux(z_s, s)_ik            (1)
    L_student = w(s) sum_ik p_ik sg[log p_aux(z_s, s) - log p_teacher(z_s, s)]_ik   (2)

over the number of positions. In (1) only the auxiliary network has a gradient, in (2)
only p: none flows through x and z_s. With m = E[x | z_s] of the student, the best
auxiliary network is (m + p_teacher) / 2, and there, under masked noise, the mean of (2)
for w = 1 is

    KL(m, p_teacher) - KL(m, p_aux) >= 0,   and 0 where m = p_teacher alone         (3)

Without the teacher in (1) p_aux is m, and (2) is KL(m, p_teacher). Under uniform noise
z_s knows more of x than p does, E[p | z_s] is not m, and (2) may be negative: the fixed
point is the same. For that reason, too, y = p ('soft', less noise) is for masks alone.

Student and teacher make each token independently of the others, given z_t and n. So a
student of few steps has to be surer of each than the teacher is, and to have its
randomness elsewhere: in z_t under uniform noise, in n where everything is masked.
Without n, a student of one step on two equal bits stays at a distance of 0.40. A
network whose weights of n are all 0 has a gradient of 0 there, on average: the noise of
training, which Adam does not shrink, is what gets it away.

Every network answers as a denoiser here, log p(x_i | z_t), whatever it predicts
(`process.predict`): one that leaves each position out learns by (1) and (2) as well.

Source: Hoogeboom, Ruhe, Heek, Mensink and Salimans 2026 (arXiv 2603.20155). It says
nothing of w, of which noise, and of the clip of the difference: those are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, input_noise, moment_matching
from diffusionlab.objectives.discrete import check_sees_all
from diffusionlab.objectives.discrete_losses import reveal_rate
from diffusionlab.processes.categorical import draw as draw_tokens
from diffusionlab.samplers import grids
from diffusionlab.samplers.tokens import TokenAncestral, TokenTweedie, nucleus
from diffusionlab.types import (
    Array,
    CategoricalPrediction,
    Cond,
    DataSpec,
    Inputs,
    Metrics,
    Network,
    Params,
    Phase,
    Process,
    Role,
    Teacher,
)

TOP_P_OFFSET = 2.0
"""What the log-probability of a token outside of the nucleus loses."""
_TIMES, _NOISE, _INPUT, _TOKENS, _STEP = range(5)  # one use of the step's key each


class Draw(NamedTuple):
    """What a student makes of noised data, and where it leads.

    Attributes:
      log_x: `[B, ..., K]`, log p; gradients flow into the student.
      x: `[B, ...]` tokens, drawn of it.
      z_t, z_s: `[B, ...]`.
      s: `[B]`.
      weight: `[B, ...]`, w(s) at the positions that count over the number of all.
      cond: of these examples.
    """

    log_x: Array
    x: Array
    z_t: Array
    z_s: Array
    s: Array
    weight: Array
    cond: Cond


def sharpened(log_probs: Array, temperature: float, top_p: float) -> Array:
    """Returns log-probabilities at a temperature, of mostly the nucleus `top_p`.

    The other tokens lose `TOP_P_OFFSET`. To have none of them left would have (2)
    diverge: the student cannot make a probability exactly 0.

    Args:
      log_probs: `[..., K]`, normalised.
      temperature: above 0; 1 changes nothing.
      top_p: in (0, 1]; 1 changes nothing.
    """
    if temperature != 1.0:
        log_probs = jax.nn.log_softmax(log_probs / temperature)
    if top_p < 1.0:
        outside = ~nucleus(log_probs, top_p)
        log_probs = jax.nn.log_softmax(log_probs - TOP_P_OFFSET * outside)
    return log_probs


def student_error(
    log_x: Array, log_aux: Array, log_teacher: Array, weight: Array, max_gap: float
) -> Array:
    """Returns equation 2 of each example, `[B]`; only `log_x` has a gradient.

    Args:
      log_x, log_aux, log_teacher: `[B, ..., K]`.
      weight: `[B, ...]`.
      max_gap: bound on the difference of the two logarithms.
    """
    gap = jax.lax.stop_gradient(jnp.clip(log_aux - log_teacher, -max_gap, max_gap))
    return base.total(weight * (jnp.exp(log_x) * gap).sum(axis=-1))


def aux_error(target: Array, log_aux: Array, weight: Array) -> Array:
    """Returns equation 1 of each example, `[B]`; only `log_aux` has a gradient.

    Args:
      target: `[B, ..., K]`, what is matched; not normalised.
      log_aux: `[B, ..., K]`.
      weight: `[B, ...]`.
    """
    target = jax.lax.stop_gradient(target)
    return base.total(-weight * (target * log_aux).sum(axis=-1))


def position_weight(
    process: Process, z_s: Array, s: Array, weight: str = "elbo"
) -> Array:
    """Returns w(s) at the positions that count over the number of all, `[B, ...]`.

    Args:
      process: whose noise it is.
      z_s: `[B, ...]`.
      s: `[B]`, above 0.
      weight: 'elbo', -alpha' / (1 - alpha), or 'one'.
    """
    if weight == "elbo":
        value = reveal_rate(process, s, z_s.ndim)
    else:
        value = process.in_work(s, z_s.ndim) * process.num_blocks
    return value * process.is_noise(z_s) / z_s[0].size


def check_ancestral(process: Process, sampler: Any) -> None:
    """Raises ValueError unless the sampler draws x and z_s as in training."""
    same = (TokenAncestral, TokenTweedie) if process.is_masked else (TokenAncestral,)
    if not isinstance(sampler, same):
        raise ValueError(
            "name: this student's tokens are drawn as in training, by "
            f"'token_ancestral', and not by {type(sampler).__name__}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiscreteMomentMatching:
    """Equations 1 and 2 in turns, for the roles `aux` and `student`.

    A step of phase 'aux' is 5 network evaluations per example, 4 without
    `average_targets`; one of phase 'student' is 5. A guided teacher is one more in
    each. Both networks start as the teacher, and none has dropout.

    As published, s ~ U(0, 1), and t is up to 1 / num_steps later. The student is
    sampled at the stops of the grid, with fresh noise n at each.

    Metrics: 'loss', equation 2, and 'loss_by_logsnr', which go to 0; 'entropy', of p
    in nats, the mean over the positions of z_t that are noise, which falls below the
    teacher's; 'aux_loss' and 'aux_loss_by_logsnr', equation 1.

    Attributes:
      process: categorical; how data become noise and what networks predict.
      networks: has the entry 'denoiser', of both roles.
      spec: shape, tokens and classes of the data.
      teacher: that is matched.
      num_steps: k, of the sampler.
      grid: of the sampler; None is uniform.
      times_option: 'continuous', the published one, or 'grid', t being one of the
        sampler's stops and s any time between it and the next.
      min_t: lower bound of s in (0, 1), and so of the weights.
      input_noise: n, 'none', 'gaussian', or, of images, 'pyramid'. The network says
        how many numbers a position gets, `noise_input`, and has them as cond['noise'].
        Of masked noise alone.
      targets: y, 'hard' or 'soft'.
      teacher_temperature: above 0; the student learns the teacher's distribution at it.
      teacher_top_p: in (0, 1]; tokens outside of the nucleus lose a factor of e^-2.
      weight: w, 'elbo', -alpha' / (1 - alpha), of masked noise, or 'one'.
      guidance_scale: of the teacher; the student has the guidance inside.
      average_targets: the second term of equation 1.
      aux_steps: steps of phase 'aux' before each one of phase 'student'.
      max_gap: bound on the difference of logarithms in equation 2.

    Raises:
      ValueError: there is no teacher, or none that can be guided; a number or a word
        is not one of these, or not for this noise; a network without such an input, or
        a causal one.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    teacher: Teacher | None
    num_steps: int = 8
    grid: grids.Grid | None = None
    times_option: str = "continuous"
    min_t: float = 1e-3
    input_noise: str = "none"
    targets: str = "hard"
    teacher_temperature: float = 1.0
    teacher_top_p: float = 1.0
    weight: str = "elbo"
    guidance_scale: float = 1.0
    average_targets: bool = True
    aux_steps: int = 1
    max_gap: float = 20.0

    processes = ("categorical",)
    samples_from = ("student",)
    gives_noise = True

    def __post_init__(self):
        base.require_teacher(self.teacher)
        base.check_guidance(self)
        check_sees_all(self.networks, "discrete_moment_matching")
        base.check_at_least(self, 1, "num_steps", "aux_steps")
        base.check_word(self, "times_option", ("continuous", "grid"))
        base.check_word(self, "input_noise", input_noise.KINDS)
        base.check_word(self, "targets", ("hard", "soft"))
        base.check_word(self, "weight", ("elbo", "one"))
        for name, most in (
            ("min_t", 1.0),
            ("teacher_top_p", 1.0),
            ("teacher_temperature", float("inf")),
            ("max_gap", float("inf")),
        ):
            if not 0 < getattr(self, name) <= most:
                bound = "" if most > 1 else f" and at most {most:g}"
                raise ValueError(
                    f"{name}: must be above 0{bound}, got {getattr(self, name)}."
                )
        self._check_noise()

    def _check_noise(self) -> None:
        if not self.process.is_masked:
            for name, word, why in (
                ("targets", "hard", "z_s tells of the token that was drawn"),
                ("weight", "one", "-alpha' / (1 - alpha) weighs masked positions"),
                ("input_noise", "none", "z_t is random there at every time"),
            ):
                if getattr(self, name) != word:
                    raise ValueError(
                        f"{name}: '{getattr(self, name)}' is for masked noise, and "
                        f"config.process is uniform, where {why}; use '{word}'."
                    )
        if self.input_noise != "none" and not self._channels:
            raise ValueError(
                f"input_noise: '{self.input_noise}' needs a network that takes it, "
                "such as a token_transformer with noise_input=4."
            )
        if self.input_noise == "pyramid" and len(self.spec.shape) != 3:
            raise ValueError(
                "input_noise: 'pyramid' is for images, and the data have shape "
                f"{tuple(self.spec.shape)}; use 'gaussian'."
            )

    @property
    def _channels(self) -> int:
        return self.networks[base.NETWORK].noise_input

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "student": Role(base.NETWORK, "teacher"),
            "aux": Role(base.NETWORK, "teacher", ema=()),
        }

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {
            "aux": Phase(("aux",), self.aux_loss),
            "student": Phase(("student",), self.student_loss),
        }

    @property
    def evaluations(self) -> Mapping[str, float]:
        teacher = base.teacher_evaluations(self)
        return {
            "aux": 1.0 + 3.0 + teacher * self.average_targets,
            "student": 3.0 + 1.0 + teacher,
        }

    def phase(self, step: int) -> str:
        """Returns 'aux' for `aux_steps` steps, then 'student' for one."""
        return base.turns(step, self.aux_steps)

    def check_sampler(self, sampler: Any) -> None:
        """Raises ValueError for a sampler that makes other steps than those trained."""
        moment_matching.check_stops(self, sampler)
        check_ancestral(self.process, sampler)

    def predict(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> CategoricalPrediction:
        """Returns log p for noise n of its own: a function of cond['key'] `[B]` and t.

        Without a key n is 0, which no sample has: such a student teaches no other.
        """
        if self.input_noise != "none" and "key" in cond:
            keys = input_noise.keys_at(cond["key"], t)
            cond = {**cond, "noise": self._input_noise(keys, z_t.shape[1:])}
        return base.apply(self, params["student"], z_t, t, cond)

    def _input_noise(self, keys: Array, shape: tuple[int, ...]) -> Array:
        """Returns n `[B, *shape, channels]`, example i from `keys[i]`."""
        return input_noise.batch(self.input_noise, keys, shape, self._channels)

    def draw(self, params: Params, inputs: Inputs) -> Draw:
        """Returns what the student with `params` makes of a batch.

        Args:
          params: of the student.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
        """
        keys, process = base.split(inputs.key, 5), self.process
        data, cond = process.encode(inputs.batch["x"]), base.labels(self, inputs.batch)
        t, s = moment_matching.times(self, keys[_TIMES], data.shape[0])
        s = jnp.maximum(s, self.min_t)
        t = jnp.maximum(t, s)
        z_t, _ = process.corrupt(keys[_NOISE], data, t)
        told = cond
        if self.input_noise != "none":
            each = jax.random.split(keys[_INPUT], data.shape[0])
            told = {**cond, "noise": self._input_noise(each, data.shape[1:])}
        log_x = base.apply(self, params, z_t, t, told).logits
        x = draw_tokens(keys[_TOKENS], jax.lax.stop_gradient(log_x))
        z_s = process.step(keys[_STEP], x, z_t, t, s)
        weight = position_weight(process, z_s, s, self.weight)
        return Draw(log_x, x, z_t, z_s, s, weight, cond)

    def aux_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 and its metrics; only `params["aux"]` has a gradient."""
        found = self.draw(inputs.params["student"], inputs)
        if self.targets == "soft":
            target = jnp.exp(found.log_x)
        else:
            target = jax.nn.one_hot(found.x, self.process.num_tokens)
        if self.average_targets:
            target += jnp.exp(self._taught(found, inputs))
        loss = aux_error(target, self._guess(found, params["aux"]), found.weight)
        return loss.mean(), {
            "aux_loss": base.metric(loss),
            "aux_loss_by_logsnr": base.by_logsnr(loss, self.process, found.s),
        }

    def student_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 2 and its metrics; only `params["student"]` has a gradient.

        The value itself goes to 0, but is not what Adam sees of it: it moves as far
        however small its gradient is.
        """
        found = self.draw(params["student"], inputs)
        guess = self._guess(found, inputs.params["aux"])
        taught = self._taught(found, inputs)
        loss = student_error(found.log_x, guess, taught, found.weight, self.max_gap)
        noisy = self.process.is_noise(found.z_t)
        entropy = -(jnp.exp(found.log_x) * found.log_x).sum(axis=-1)
        return loss.mean(), {
            "loss": base.metric(loss),
            "loss_by_logsnr": base.by_logsnr(loss, self.process, found.s),
            "entropy": ((noisy * entropy).sum(), noisy.sum().astype(jnp.float32)),
        }

    def _guess(self, found: Draw, params: Params) -> Array:
        return base.apply(self, params, found.z_s, found.s, found.cond).logits

    def _taught(self, found: Draw, inputs: Inputs) -> Array:
        teacher = inputs.params["teacher"]
        taught = base.teach(self, teacher, found.z_s, found.s, found.cond).logits
        taught = sharpened(taught, self.teacher_temperature, self.teacher_top_p)
        return jax.lax.stop_gradient(taught)
