"""Denoising: one network learns to undo gaussian noise.

    L = E_{t, eps} [ weight(t) factor(t) mean_pixels (eps - eps_hat(z_t, t))² ]     (1)

with t and weight(t) from `times`, factor(t) from `weighting`. For a network that
predicts in another space, (eps - eps_hat)² = r(t) (target - raw)², and it is the right
side that is computed: eps - eps_hat itself loses its digits at the ends of time.

With `scales`, the error is summed over average-pooled residuals, D_s pooling to s x s:

    sum_s 1/s mean_pixels (D_s[eps] - D_s[eps_hat])²                                (2)

With `learned_weighting`, a small network u of logsnr is trained along with the
denoiser. With E = factor(t) times the squared error of (1) or (2), both minimise

    L = E_{t, eps} [ weight(t) (E / exp(u(logsnr)) + u(logsnr)) ]                   (3)

whose best u is log E[E | t]: every noise level then counts as much as any other.

Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239) and Kingma and Gao 2023
(arXiv 2303.00848) for (1); Hoogeboom, Heek and Salimans 2023 (arXiv 2301.11093),
section 3.2, for (2); Karras et al. 2024 (arXiv 2312.02696), equations 14 to 16, for
(3). The weight of an importance-sampled time multiplies both parts of (3), so that it
changes how times are drawn and not what is minimised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.objectives.weightings import V, Weighting
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
    Times,
)

_TIMES, _NOISE, _LABEL, _NETWORK = range(4)  # one use of the step's key each
NUM_BINS, BIN_RANGE = 10, (-15.0, 15.0)


def pool(images: Array, side: int) -> Array:
    """Returns `[..., H, W, C]` averaged to `[..., side, side, C]`."""
    *rest, height, width, channels = images.shape
    windows = (*rest, side, height // side, side, width // side, channels)
    return images.reshape(windows).mean(axis=(-4, -2))


def denoising_error(
    process: Process,
    x: Array,
    eps: Array,
    raw: Array,
    t: Array,
    scales: tuple[int, ...] = (),
) -> Array:
    """Returns the squared eps error of a raw network output, per example.

    Args:
      process: how `raw` is read.
      x, eps: `[B, ...]` clean data and the noise that was added.
      raw: `[B, ...]` network output at z_t.
      t: `[B]` in [0, 1].
      scales: sides of equation 2; empty is the plain mean over pixels.

    Returns:
      `[B]` float32.

    Raises:
      ValueError: `raw` and `x` differ in shape.
    """
    if raw.shape != x.shape:
        raise ValueError(
            f"config.networks.denoiser: answers {raw.shape} for data of {x.shape}."
        )
    # Pooling is linear: pool the residual once instead of both sides.
    residual = process.target(x, eps, t) - raw.astype(jnp.float32)
    pixels = tuple(range(1, residual.ndim))
    if scales:
        error = sum(
            jnp.mean(pool(residual, side) ** 2, axis=pixels) / side for side in scales
        )
    else:
        error = jnp.mean(residual**2, axis=pixels)
    return process.eps_error_scale(t) * error


def loss_by_logsnr(loss: Array, logsnr: Array) -> tuple[Array, Array]:
    """Returns (sum, count), `[10]` each, of `loss` `[B]` in equal bins of logsnr.

    The bins span [-15, 15]; what lies outside goes to the nearer end.
    """
    low, high = BIN_RANGE
    place = jnp.floor((logsnr - low) / (high - low) * NUM_BINS)
    bins = jnp.clip(place, 0, NUM_BINS - 1).astype(jnp.int32)
    one_hot = jax.nn.one_hot(bins, NUM_BINS)
    return loss @ one_hot, one_hot.sum(0)


def denoise(
    network: Network,
    process: Process,
    params: Params,
    z_t: Array,
    t: Array,
    cond: Cond,
    *,
    train: bool = False,
    key: Array | None = None,
) -> Prediction:
    """Returns the (x, eps) of a network that denoises, each `[B, ...]`.

    Args:
      network, params: of one role.
      process: how its raw output is read.
      z_t: `[B, ...]` noisy data.
      t: scalar or `[B]`, in [0, 1].
      cond: what the network conditions on besides time: 'label' `[B]`, where
        `num_classes` is the null class.
      train, key: dropout is on if both say so.
    """
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z_t.shape[:1])
    cond = {**cond, "t": t, "logsnr": process.schedule.logsnr(t)}
    scaled = process.network_input(z_t, t)
    raw = network.apply(params, scaled, cond, train=train, key=key)
    return process.predict(raw, z_t, t)


def drop_labels(objective: Any, key: Array, batch: Mapping[str, Array]) -> Cond:
    """Returns cond with the labels `[B]`, some of them the null class; {} without any.

    Args:
      objective: says the data's `spec` and the probability `label_dropout`.
      key: of the draw.
      batch: has 'label' where the data have classes.
    """
    num_classes = objective.spec.num_classes
    if not num_classes:
        return {}
    label = batch["label"]
    drop = jax.random.bernoulli(key, float(objective.label_dropout), label.shape)
    return {"label": jnp.where(drop, num_classes, label)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """Equation 1 for one role, `denoiser`; one network evaluation per example.

    With `learned_weighting`, equation 3 for one more role, `uncertainty`, in the same
    phase: the network `config.networks.uncertainty` and `config.optim.uncertainty`.

    Attributes:
      process: how data become noise and what the network predicts.
      networks: has the entry 'denoiser', and 'uncertainty' where it is used.
      spec: shape and classes of the data.
      weighting: factor(t) on the squared eps error.
      times: law of the training times.
      label_dropout: probability in [0, 1] that a label becomes the null class,
        index `num_classes`; nothing is drawn for data without classes.
      scales: sides of equation 2; each divides the side of the square images, and the
        side itself is one of them, or nothing would train the finest detail.
      learned_weighting: minimise equation 3.

    Raises:
      ValueError: label_dropout outside [0, 1]; scales that do not fit the data; a
        weighting for data of another standard deviation than the process's.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec
    weighting: Weighting
    times: Times
    label_dropout: float = 0.1
    scales: tuple = ()
    learned_weighting: bool = False

    samples_from = ("denoiser",)

    def __post_init__(self):
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(
                f"label_dropout: must be in [0, 1], got {self.label_dropout}."
            )
        if self.scales:
            self._check_scales()
        known = getattr(self.process, "sigma_data", None)
        told = getattr(self.weighting, "sigma_data", known)
        if told != known:
            raise ValueError(
                f"weighting.sigma_data: is {told}, but the process has {known}; give "
                "both the same number."
            )
        chain = getattr(self.process.schedule, "num_timesteps", None)
        drawn = getattr(self.times, "num_timesteps", chain)
        if chain is not None and drawn != chain:
            raise ValueError(
                f"times.num_timesteps: is {drawn}, but the schedule's chain has "
                f"{chain}; give both the same number."
            )

    def _check_scales(self) -> None:
        shape = self.spec.shape
        if len(shape) < 3 or shape[-3] != shape[-2]:
            raise ValueError(f"scales: need square images, got data of shape {shape}.")
        side = shape[-2]
        if side not in self.scales or any(s < 1 or side % s for s in self.scales):
            raise ValueError(
                f"scales: expected divisors of the side {side}, itself among them, "
                f"got {tuple(self.scales)}."
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"denoiser": Role("denoiser")}
        if self.learned_weighting:
            roles["uncertainty"] = Role("uncertainty", ema=())
        return roles

    @property
    def phases(self) -> Mapping[str, Phase]:
        return {"train": Phase(tuple(self.roles), self.loss)}

    def phase(self, step: int) -> str:
        """Returns 'train' for every step."""
        return "train"

    def _cond(self, t: Array, cond: Cond) -> Cond:
        return {**cond, "t": t, "logsnr": self.process.schedule.logsnr(t)}

    def predict(
        self, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
    ) -> Prediction:
        """Returns the denoiser's (x, eps) for parameters by role; see `denoise`."""
        network = self.networks["denoiser"]
        return denoise(network, self.process, params["denoiser"], z_t, t, cond)

    def loss(
        self, params: Mapping[str, Params], inputs: Inputs
    ) -> tuple[Array, Metrics]:
        """Returns equation 1 or 3 on a batch, and its metrics; float32.

        The metric 'loss' is what is minimised. Where that is equation 3,
        'weighted_error' is equation 1, which other runs can be compared with;
        'loss_by_logsnr' is always equation 1.

        Args:
          params: by role.
          inputs: batch with 'x' `[B, ...]`, and 'label' `[B]` for data with classes.
        """
        keys = [jax.random.fold_in(inputs.key, use) for use in range(4)]
        x = inputs.batch["x"].astype(jnp.float32)
        t, weight = self.times.sample(keys[_TIMES], x.shape[0], self.process.schedule)
        z_t, eps = self.process.corrupt(keys[_NOISE], x, t)
        cond = self._cond(t, drop_labels(self, keys[_LABEL], inputs.batch))
        raw = self.networks["denoiser"].apply(
            params["denoiser"],
            self.process.network_input(z_t, t),
            cond,
            train=True,
            key=keys[_NETWORK],
        )
        schedule = self.process.schedule
        error = denoising_error(self.process, x, eps, raw, t)
        scaled = (
            denoising_error(self.process, x, eps, raw, t, self.scales)
            if self.scales
            else error
        )
        factor = self.weighting(schedule, t)
        loss = weighted = weight * factor * scaled
        count = jnp.float32(loss.shape[0])
        metrics = {
            "v_mse": ((V()(schedule, t) * error).sum(), count),
            "loss_by_logsnr": loss_by_logsnr(weighted, cond["logsnr"]),
        }
        if self.learned_weighting:
            apply = self.networks["uncertainty"].apply
            u = apply(params["uncertainty"], z_t, cond, train=True)
            loss = weight * (factor * scaled * jnp.exp(-u) + u)
            metrics["weighted_error"] = (weighted.sum(), count)
        metrics["loss"] = (loss.sum(), count)
        return loss.mean(), metrics
