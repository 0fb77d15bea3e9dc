"""Next-token prediction: a network that gives the probability of a text.

    log p(x) = sum_i log p(x_i | x_1 ... x_{i-1}),    L = -log p(x) / length       (1)

The loss is in nats per token. It is exact, where diffusion has bounds: what samples are
judged by, and what bounds are compared with. Perplexity is exp of the mean of L over
examples, and no mean of exponentials: it is not among the metrics, which are averaged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

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
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """Equation 1 for one role, `language_model`; one network evaluation per example.

    There is nothing to sample from such a run by diffusion: it has no `predict`.

    Attributes:
      process: makes tokens of data that are none; its noise is not used.
      networks: has the entry 'language_model', a causal one.
      spec: shape of the data.

    Raises:
      ValueError: the network sees the tokens that it is to predict.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec

    processes = ("categorical",)
    samples_from = ("language_model",)
    evaluations = {"train": 3.0}

    def __post_init__(self):
        # Where it is missing, the experiment says so.
        network = self.networks.get("language_model")
        if network is not None and not network.is_causal:
            raise ValueError(
                "name: the objective 'language_model' needs a causal network as "
                "config.networks.language_model, such as 'causal_transformer'."
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"language_model": Role("language_model")}

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {"train": Phase(("language_model",), self.loss)}

    def phase(self, step: int) -> str:
        """Returns 'train' for every step."""
        return "train"

    def token_log_probs(self, params: Mapping[str, Params], tokens: Array) -> Array:
        """Returns log p(x_i | x before i) of each token, `[B, ...]` float32.

        Args:
          params: by role.
          tokens: `[B, ...]` int32 below the number of tokens.
        """
        return self._log_probs(params["language_model"], tokens)

    def _log_probs(self, params: Params, tokens: Array, **options) -> Array:
        network = self.networks["language_model"]
        if network.scores_targets:
            cond = {"target": tokens}
            return network.apply(params, tokens, cond, **options)
        logits = network.apply(params, tokens, {}, **options)
        expected = (*tokens.shape, self.process.num_tokens)
        if logits.shape != expected:
            raise ValueError(
                f"config.networks.language_model: answers {logits.shape}, and must "
                f"answer {expected}, a logit per token."
            )
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 on a batch, and its metrics; float32.

        Args:
          params: by role.
          inputs: batch with 'x' `[B, ...]`.
        """
        tokens = self.process.encode(inputs.batch["x"])
        log_probs = self._log_probs(
            params["language_model"], tokens, train=True, key=inputs.key
        )
        loss = -log_probs.reshape(tokens.shape[0], -1).mean(axis=1)
        total, count = loss.sum(), jnp.float32(loss.shape[0])
        metrics = {
            "loss": (total, count),
            "bits_per_token": (total / math.log(2), count),
        }
        return loss.mean(), metrics
