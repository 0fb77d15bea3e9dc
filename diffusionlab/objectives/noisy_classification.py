"""Classification of noisy data: the network that classifier guidance needs.

    L = E_{t, eps} [ weight(t) (-log p(label | z_t, t)) ]                           (1)

with t and weight(t) from `times`. Its minimiser is the posterior of the label given
z_t, whatever the law of t. At t = 1 nothing is left to see: the loss is the entropy of
the labels there, log num_classes for equal shares.

Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusionlab.objectives.denoising import loss_by_logsnr
from diffusionlab.types import (
    Array,
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
)

_TIMES, _NOISE, _NETWORK = range(3)  # one use of the step's key each


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NoisyClassification:
    """Equation 1 for one role, `classifier`; one network evaluation per example.

    There is nothing to sample from such a run: it has no `predict`.

    Attributes:
      process: how data become noise; what it says of predictions is not used.
      networks: has the entry 'classifier', which answers `[B, num_classes]` logits.
      spec: shape and classes of the data.
      times: law of the training times.

    Raises:
      ValueError: the data have no classes.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    times: Times

    samples_from = ("classifier",)

    def __post_init__(self):
        if not self.spec.num_classes:
            raise ValueError(
                "name: the objective 'noisy_classification' needs labels, and the "
                "data have no classes."
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"classifier": Role("classifier")}

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {"train": Phase(("classifier",), self.loss)}

    def phase(self, step: int) -> str:
        """Returns 'train' for every step."""
        return "train"

    def log_probs(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> Array:
        """Returns log p(y | z_t) `[B, num_classes]`, float32.

        Args:
          params: by role.
          z_t: `[B, ...]` noisy data.
          t: scalar or `[B]`, in [0, 1].
          cond: not looked at.
        """
        return self._log_probs(params["classifier"], z_t, t)

    def features(self, params: Mapping[str, Params], x: Array) -> Mapping[str, Array]:
        """Returns 'features' `[B, d]` and 'logits' `[B, num_classes]` of clean data."""
        t = jnp.zeros(x.shape[0])
        inputs = self._inputs(self.process.mix(x, jnp.zeros_like(x), t), t)
        network = self.networks["classifier"]
        logits, found = network.features(params["classifier"], *inputs)
        return {"features": found, "logits": logits}

    def _inputs(self, z_t: Array, t: Array) -> tuple[Array, Cond]:
        cond = {"t": t, "logsnr": self.process.schedule.logsnr(t)}
        return self.process.network_input(z_t, t), cond

    def _log_probs(self, params: Params, z_t: Array, t: Array, **options) -> Array:
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z_t.shape[:1])
        logits = self.networks["classifier"].apply(
            params, *self._inputs(z_t, t), **options
        )
        expected = (z_t.shape[0], self.spec.num_classes)
        if logits.shape != expected:
            raise ValueError(
                f"config.networks.classifier: answers {logits.shape}, and must answer "
                f"{expected}, a logit per class; use the network 'classifier'."
            )
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 on a batch, and its metrics; float32.

        Args:
          params: by role.
          inputs: batch with 'x' `[B, ...]` and 'label' `[B]`.
        """
        keys = [jax.random.fold_in(inputs.key, use) for use in range(3)]
        x, label = inputs.batch["x"].astype(jnp.float32), inputs.batch["label"]
        schedule = self.process.schedule
        t, weight = self.times.sample(keys[_TIMES], x.shape[0], schedule)
        z_t, _ = self.process.corrupt(keys[_NOISE], x, t)
        log_probs = self._log_probs(
            params["classifier"], z_t, t, train=True, key=keys[_NETWORK]
        )
        own = jnp.take_along_axis(log_probs, label[:, None], axis=1)[:, 0]
        right = (jnp.argmax(log_probs, axis=1) == label).astype(jnp.float32)
        loss = -weight * own
        logsnr, count = schedule.logsnr(t), jnp.float32(loss.shape[0])
        metrics = {
            "loss": (loss.sum(), count),
            "accuracy": (right.sum(), count),
            "loss_by_logsnr": loss_by_logsnr(loss, logsnr),
            "accuracy_by_logsnr": loss_by_logsnr(right, logsnr),
        }
        return loss.mean(), metrics
