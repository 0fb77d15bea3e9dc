"""Diffusion of tokens: one network learns to undo masking, or random replacement.

    L = E_{t, z_t} [ weight(t) mean_i nats_i(x, z_t, t) ]                           (1)

with t and weight(t) from `times`, in nats per token, and nats_i one of
`objectives/discrete_losses.py`:

    elbo           the bound of continuous time; masked, or uniform, through what the
                   process calls leave_one_out
    score_entropy  the same of a network that predicts scores
    steps          the bound of T = `num_timesteps` ancestral steps, T times one step
    hybrid         steps + hybrid_weight (-log x_hat_x)
    cross_entropy  -log x_hat_x; of masked tokens, or of all

The first four are bounds of -log p(x): so is the metric `bits_per_token`. The first two
have weights like 1 / t. They are cut at `min_t`, and what lies below is one step:

    -log p(x | z) / min_t  at t = min_t, where t ~ U(0, 1) is below it              (2)

in expectation -log p(x | z_min_t), which closes the bound whatever alpha is at t = 0,
above the uncut one by terms of order min_t². Of text in blocks the block in work
counts alone, as often as there are blocks, and is cut at its own time. What a schedule
leaves of x at t = 1 is not in the loss; the evaluator `elbo` adds it. Score entropy
under uniform noise has the weight -alpha' / alpha, and scores that are not exact, at
t = 1, too: it is cut at 1 - min_t as well, where z is noise but for
KL(q(z_t | x) || 1/K), which is counted.

Cross-entropy under uniform noise is no bound. Its best answer is the denoiser, and that
of `elbo` and `steps` the distribution without the position's own token; the process
knows how one becomes the other, so a network of either kind trains on any of them. But
it has to divide by 1 - alpha where it is small: on a chain of three tokens a network of
the kind 'denoiser' was 0.22 nats above the entropy with `elbo`, and one of the kind
'leave_one_out' 0.015 after half as many steps.

Source: Sahoo et al. 2024, MDLM (arXiv 2406.07524), Shi et al. 2024, MD4
(arXiv 2406.04329), Schiff et al. 2024 (arXiv 2412.10193), Lou et al. 2023, SEDD
(arXiv 2310.16834), and Austin et al. 2021, D3PM (arXiv 2107.03006), where 0.001 is the
weight of `hybrid`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffusionlab.objectives import discrete_losses as losses
from diffusionlab.objectives.denoising import denoise, drop_labels, loss_by_logsnr
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
    Times,
    lift,
)

_TIMES, _NOISE, _LABEL, _NETWORK = range(4)  # one use of the step's key each
_RATES = {
    "elbo": losses.elbo,
    "score_entropy": losses.score_entropy,
    "steps": losses.steps,
    "hybrid": losses.steps,
    "cross_entropy": losses.surprise,
}
_CONTINUOUS, _CHAINS = ("elbo", "score_entropy"), ("steps", "hybrid")


def chain_times(u: Array, num_timesteps: int) -> tuple[Array, Array]:
    """Returns t = (k + 1) / T and s = k / T, k = floor(u T), for u in [0, 1]."""
    k = jnp.minimum(jnp.floor(u * num_timesteps), num_timesteps - 1)
    return (k + 1) / num_timesteps, k / num_timesteps


def check_sees_all(networks: Mapping[str, Network], objective: str) -> None:
    """Raises ValueError where the denoiser is causal, in the name of an objective."""
    # Where it is missing, the experiment says so.
    network = networks.get("denoiser")
    if network is not None and network.is_causal:
        raise ValueError(
            f"name: the objective '{objective}' needs a network that sees all tokens "
            "as config.networks.denoiser, such as 'token_transformer'; got one that "
            "sees those before."
        )


def nelbo(
    process: Process,
    predict: Callable[[Array, Array], CategoricalPrediction],
    key: Array,
    x: Array,
    t: Array,
    num_timesteps: int = 0,
) -> Array:
    """Returns the integrand of a bound of -log p(x) at t, `[B]`, nats per example.

    The mean over t ~ U(0, 1) is the bound. In continuous time there are to be added
    what is left of x at t = 1 and what is hidden of it at t = 0, where the schedule
    does not end at alpha 0 and 1.

    Args:
      process: the noise.
      predict: `(z_t, t [B]) -> CategoricalPrediction`; it is called once.
      key: of the noise.
      x: `[B, ...]` int32 tokens; see `process.encode`.
      t: `[B]` in [0, 1]; above 0 in continuous time.
      num_timesteps: T, and t chooses one of the steps; 0 is continuous time.
    """
    rate, s = losses.elbo, t
    if num_timesteps:
        rate = losses.steps
        t, s = chain_times(t, num_timesteps)
    z_t, _ = process.corrupt(key, x, t)
    answer = losses.read(process, predict(z_t, t), x, z_t)
    nats = rate(process, answer, x, z_t, t, s) * (num_timesteps or 1)
    return nats.sum(axis=tuple(range(1, x.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Discrete:
    """Equation 1 for one role, `denoiser`; one network evaluation per example.

    Where the loss needs no more of the network than the log-probability of x, one that
    says so in `scores_targets` is asked for that alone: all logits are never held.

    Attributes:
      process: how tokens become noise and what the network predicts.
      networks: has the entry 'denoiser'.
      spec: shape and classes of the data.
      times: law of the training times.
      loss: 'elbo', 'score_entropy', 'steps', 'hybrid' or 'cross_entropy'.
      weight: of cross_entropy: 'one', or 'elbo' for masked noise, which makes it that.
      num_timesteps: T of 'steps' and 'hybrid'.
      hybrid_weight: of the cross-entropy in 'hybrid', per token.
      min_t: t is at least this, in (0, 1); see equation 2. No use in T steps.
      label_dropout: probability in [0, 1] that a label becomes the null class,
        index `num_classes`; nothing is drawn for data without classes.

    Raises:
      ValueError: a number out of its range; an unknown word; a loss that does not fit
        the network's prediction, the noise, or the law of times; a causal network.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    times: Times
    loss: str = "elbo"
    weight: str = "one"
    num_timesteps: int = 1000
    hybrid_weight: float = 0.001
    min_t: float = 1e-3
    label_dropout: float = 0.1

    processes = ("categorical",)
    samples_from = ("denoiser",)
    evaluations = {"train": 3.0}

    def __post_init__(self):
        for name, known in (("loss", tuple(_RATES)), ("weight", ("one", "elbo"))):
            if (word := getattr(self, name)) not in known:
                raise ValueError(
                    f"{name}: unknown '{word}'; known: {', '.join(known)}."
                )
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(
                f"label_dropout: must be in [0, 1], got {self.label_dropout}."
            )
        if not 0 < self.min_t < 1:
            raise ValueError(f"min_t: must be in (0, 1), got {self.min_t}.")
        if self.num_timesteps < 1:
            raise ValueError(
                f"num_timesteps: must be at least 1, got {self.num_timesteps}."
            )
        if self.hybrid_weight < 0:
            raise ValueError(
                f"hybrid_weight: must be at least 0, got {self.hybrid_weight}."
            )
        check_sees_all(self.networks, "discrete")
        # Another process has no noise; that the experiment answers for.
        if getattr(self.process, "kind", None) == "categorical":
            self._check_loss()
        self._check_times()

    def _check_loss(self) -> None:
        prediction, is_masked = self.process.prediction, self.process.is_masked
        if self.loss == "score_entropy" and prediction != "score":
            raise ValueError(
                "loss: 'score_entropy' is of a network with process.prediction "
                f"'score', got '{prediction}'."
            )
        if self.loss != "score_entropy" and prediction == "score" and not is_masked:
            raise ValueError(
                f"loss: '{self.loss}' cannot train scores under uniform noise; take "
                "'score_entropy'."
            )
        if self.weight == "elbo" and self.loss != "cross_entropy":
            raise ValueError(
                f"weight: 'elbo' is one of 'cross_entropy'; leave it out of the loss "
                f"'{self.loss}'."
            )
        if self.weight == "elbo" and not is_masked:
            raise ValueError(
                "weight: no weight makes cross-entropy under uniform noise an ELBO; "
                "take 'one', or loss='elbo'."
            )

    def _check_times(self) -> None:
        if self.loss == "cross_entropy" and self.weight == "one":
            return
        if self._is_cut_above and self.min_t >= 0.5:
            raise ValueError(
                "min_t: must be below 0.5, for 'score_entropy' under uniform noise is "
                f"cut at 1 - min_t as well; got {self.min_t}."
            )
        if not getattr(self.times, "as_uniform", True):
            raise ValueError(
                f"times.as_uniform: must be True, or '{self.loss}' is no bound."
            )
        # A law on a chain of steps.
        chain = getattr(self.times, "num_timesteps", None)
        if chain is not None and (
            self.loss not in _CHAINS or chain != self.num_timesteps
        ):
            raise ValueError(
                f"times.num_timesteps: is {chain}; a chain's times are those of "
                f"'steps' and 'hybrid' with as many num_timesteps; '{self.loss}' of "
                f"{self.num_timesteps} takes 'uniform'."
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"denoiser": Role("denoiser")}

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {"train": Phase(("denoiser",), self.train_loss)}

    def phase(self, step: int) -> str:
        """Returns 'train' for every step."""
        return "train"

    def predict(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> CategoricalPrediction:
        """Returns the denoiser for parameters by role; z_t `[B, ...]`, t any."""
        network = self.networks["denoiser"]
        return denoise(network, self.process, params["denoiser"], z_t, t, cond)

    def train_loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 on a batch, and its metrics; float32.

        All metrics are means over tokens. 'cross_entropy' is that of the noise: of
        masked tokens, or of all of them.

        Args:
          params: by role.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
        """
        keys = [jax.random.fold_in(inputs.key, use) for use in range(4)]
        process = self.process
        x = process.encode(inputs.batch["x"])
        u, weight = self.times.sample(keys[_TIMES], x.shape[0], process.schedule)
        t, s = self._times(u)
        z_t, _ = process.corrupt(keys[_NOISE], x, t)
        logsnr = process.schedule.logsnr(t)
        label = drop_labels(self, keys[_LABEL], inputs.batch)
        answer = self._answer(
            params["denoiser"],
            x,
            z_t,
            t,
            {**label, "t": t, "logsnr": logsnr},
            keys[_NETWORK],
        )
        nats = self._bound(answer, x, z_t, t, s, u)
        positions = tuple(range(1, x.ndim))
        bound = weight * nats.mean(axis=positions)
        work = process.in_work(t, x.ndim)
        surprise = (answer.surprise * work * process.num_blocks).mean(axis=positions)
        is_hybrid = self.loss == "hybrid"
        loss = bound + weight * (self.hybrid_weight * is_hybrid) * surprise
        count = jnp.float32(loss.shape[0])
        metrics = {
            "loss": (loss.sum(), count),
            "cross_entropy": (
                (answer.surprise * work).sum(),
                (process.is_noise(z_t) & work).sum().astype(jnp.float32),
            ),
            "loss_by_logsnr": loss_by_logsnr(loss, logsnr),
        }
        if self.loss in _CONTINUOUS + _CHAINS:
            metrics["bits_per_token"] = (bound.sum() / math.log(2), count)
        return loss.mean(), metrics

    @property
    def _is_cut_above(self) -> bool:
        return self.loss == "score_entropy" and not self.process.is_masked

    def _times(self, u: Array) -> tuple[Array, Array]:
        """Returns t and s of times u from the law; s is of chains alone."""
        if self.loss in _CHAINS:
            return chain_times(u, self.num_timesteps)
        block, v = self._within(u)
        t = (block + jnp.maximum(v, self.min_t)) / self.process.num_blocks
        if self._is_cut_above:
            t = jnp.minimum(t, 1 - self.min_t)
        return t, t

    def _within(self, u: Array) -> tuple[Array, Array]:
        """Returns how many blocks come after the one in work, and its own time."""
        scaled = self.process.num_blocks * u
        block = jnp.clip(jnp.floor(scaled), 0, self.process.num_blocks - 1)
        return block, scaled - block

    def _bound(
        self, answer: losses.Answer, x: Array, z_t: Array, t: Array, s: Array, u: Array
    ) -> Array:
        """Returns nats_i of equation 1 without the part of `hybrid`, `[B, ...]`."""
        is_elbo = self.weight == "elbo"
        rate = losses.elbo if is_elbo else _RATES[self.loss]
        nats = rate(self.process, answer, x, z_t, t, s)
        if self.loss in _CHAINS:
            return nats * self.num_timesteps
        work = self.process.in_work(t, x.ndim) * self.process.num_blocks
        if not is_elbo and self.loss not in _CONTINUOUS:
            return nats * work
        u, v = lift(u, x.ndim), lift(self._within(u)[1], x.ndim)
        closing = answer.surprise * work
        if self._is_cut_above:
            closing = losses.score_surprise(self.process, answer, x, z_t, t)
            left = lift(losses.prior(self.process, t), x.ndim)
            nats = jnp.where(u > 1 - self.min_t, left / self.min_t, nats)
        return jnp.where(v < self.min_t, closing / self.min_t, nats)

    def _answer(
        self, params: Params, x: Array, z_t: Array, t: Array, cond: Cond, key: Array
    ) -> losses.Answer:
        """Returns what the network says; of x alone where that is enough."""
        process, network = self.process, self.networks["denoiser"]
        is_denoiser = process.is_masked or process.prediction == "denoiser"
        enough = process.is_masked or self.loss == "cross_entropy"
        of_target = network.scores_targets and is_denoiser and enough
        of_target = of_target and self.loss != "score_entropy"
        if of_target:
            cond = {**cond, "target": x}
        raw = network.apply(
            params, process.network_input(z_t, t), cond, train=True, key=key
        )
        expected = x.shape if of_target else (*x.shape, process.num_tokens)
        if raw.shape != expected:
            raise ValueError(
                f"config.networks.denoiser: answers {raw.shape} for tokens of "
                f"{x.shape}; expected {expected}."
            )
        if of_target:
            hidden = process.is_noise(z_t)
            return losses.Answer(jnp.where(hidden, -raw.astype(jnp.float32), 0.0))
        return losses.read(process, process.predict(raw, z_t, t), x, z_t, raw)
