"""The categorical process: tokens that are masked, or replaced at random.

    q(z_t | x) = Cat(alpha x + (1 - alpha) pi), of each position by itself          (1)

with x and z one-hot. pi is the mask symbol, K after the tokens 0 ... K - 1 (`masked`),
or 1/K on the tokens (`uniform`). With a = alpha_t / alpha_s for s < t,

    q(z_s | z_t, x) ∝ [a z_t + (1 - a) (pi z_t) 1] * [alpha_s x + (1 - alpha_s) pi] (2)

For `masked` that keeps what is not masked, and reveals x with probability

    u = (alpha_s - alpha_t) / (1 - alpha_t)                                         (3)

Every prediction here is the `denoiser`: log p(x_i | z_t) of each position i, from all
of z_t. What goes into (2) in the place of x is another thing, the same without the
position's own token: leave_one_out, p(x_i | z_t without i), with

    denoiser_k ∝ leave_one_out_k (alpha [k = z_i] + (1 - alpha) / K)                (4)

for `uniform`. Samples x of the denoiser go into (2) as well, with the same law of z_s;
the denoiser itself does not, and samplers drawn that way do not converge. So a network
of either kind becomes the one prediction, and `leave_one_out` gives the other back.
For `masked` the two agree wherever it matters, at the masked positions.

What a network can answer, [..., K] for each position:

    denoiser        logits of p(x_i | z_t)
    leave_one_out   logits of p(x_i | z_t without i)
    score           log of SEDD's concrete score, s_j = q(z with j at i) / q(z); of
                    masked tokens over alpha / (1 - alpha): the denoiser's logits again

Text may be made block by block, `block_length` tokens at a time, each given those
before it: with n blocks, position i of block b has a time of its own,

    t_i = clip(n t - (n - 1 - b), 0, 1)                                             (5)

so that while t goes from 1 to 0 one block after the other becomes clean, and those to
come are noise, which says nothing. The bound, the posterior and the samplers are those
of any other schedule; a grid should have a multiple of n steps. Blocks of one token are
autoregression. The network sees all of z_t, so a step costs what it costs without them.

Data are tokens, integers `[B, ...]`, or numbers in [-1, 1] such as pixels, which
`levels` makes tokens of: `encode` on the way in, `decode` on the way out.

Source: Austin et al. 2021, D3PM (arXiv 2107.03006), for (1) and (2); Sahoo et al. 2024,
MDLM (arXiv 2406.07524), for (3); Lou et al. 2023, SEDD (arXiv 2310.16834), for scores;
Gourevitch et al. 2026 (arXiv 2605.22765) for the two predictions under uniform noise;
Arriola et al. 2025 (arXiv 2503.09573) for blocks, there with a network that sees those
before and the one in work.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.types import Array, CategoricalPrediction, DataSpec, Schedule, lift

NOISES = ("masked", "uniform")
PREDICTIONS = ("denoiser", "leave_one_out", "score")
_TINY = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical:
    """Equation 1 under a schedule of alpha, with a network that predicts in one way.

    Every `t` and `s` is in [0, 1], a scalar or `[B]`. Tokens are int32.

    Attributes:
      spec: of the data; says how many tokens there are, if they are tokens.
      schedule: t -> alpha, one of `schedules/alpha.py`.
      noise: 'masked' or 'uniform'.
      prediction: what the network's output means: denoiser, leave_one_out or score.
      levels: of data in [-1, 1]: token i is -1 + 2 i / (levels - 1).
      block_length: tokens that are made at a time, of text; 0 is all of them.

    Raises:
      ValueError: another word or schedule; levels where data are tokens, or too few;
        blocks that do not divide a text, or of scores.
    """

    spec: DataSpec
    schedule: Schedule
    noise: str = "masked"
    prediction: str = "denoiser"
    levels: int = 0
    block_length: int = 0

    kind = "categorical"

    def __post_init__(self):
        for name, known in (("noise", NOISES), ("prediction", PREDICTIONS)):
            if (word := getattr(self, name)) not in known:
                raise ValueError(
                    f"{name}: unknown '{word}'; known: {', '.join(known)}."
                )
        if not hasattr(self.schedule, "alpha_derivative"):
            raise ValueError(
                f"schedule: {type(self.schedule).__name__} is of gaussian noise; "
                "tokens have those whose names begin with 'alpha_'."
            )
        if self.spec.num_tokens and self.levels:
            raise ValueError(
                f"levels: the data are tokens, {self.spec.num_tokens} of them; leave "
                "it out."
            )
        if self.num_tokens < 2:
            raise ValueError(
                "levels: the data are no tokens; say how many levels between -1 and 1 "
                f"they have, at least 2, got {self.levels}."
            )
        if not self.block_length:
            return
        shape, length = tuple(self.spec.shape), self.block_length
        if len(shape) != 1 or length < 1 or shape[0] % length:
            raise ValueError(
                f"block_length: must divide a text's length, got {length}, and the "
                f"data have shape {shape}; use 0 for one block."
            )
        if self.prediction == "score":
            raise ValueError(
                "block_length: scores are of a whole text; use prediction 'denoiser'."
            )

    @property
    def num_tokens(self) -> int:
        """K, without the mask."""
        return self.spec.num_tokens or self.levels

    @property
    def num_symbols(self) -> int:
        """Of z_t: K, or K + 1 with the mask, which is the last."""
        return self.num_tokens + self.is_masked

    @property
    def num_blocks(self) -> int:
        """That are made one after the other; 1 without `block_length`."""
        return self.spec.shape[0] // self.block_length if self.block_length else 1

    @property
    def is_masked(self) -> bool:
        return self.noise == "masked"

    @property
    def mask(self) -> int:
        """The symbol that hides a token; none under uniform noise."""
        return self.num_tokens if self.is_masked else -1

    def alpha(self, t: Array, ndim: int, classes: bool = False) -> Array:
        """Returns alpha of each position, to be multiplied with tokens.

        Args:
          t: scalar or `[B]`.
          ndim: number of axes of the tokens, `[B, ...]`, or of one example's.
          classes: to go with a distribution of each, `[B, ..., K]`.
        """
        return self.schedule.alpha(jnp.clip(self._time(t, ndim, classes), 0, 1))

    def one_minus_alpha(self, t: Array, ndim: int, classes: bool = False) -> Array:
        """Returns 1 - alpha, as `alpha`."""
        return self.schedule.noise(jnp.clip(self._time(t, ndim, classes), 0, 1))

    def alpha_derivative(self, t: Array, ndim: int) -> Array:
        """Returns d alpha / dt, as `alpha`: 0 but for the block in work."""
        time = jnp.clip(self._time(t, ndim), 0, 1)
        slope = self.schedule.alpha_derivative(time)
        if not self.block_length:
            return slope
        return jnp.where(self.in_work(t, ndim), self.num_blocks * slope, 0.0)

    def in_work(self, t: Array, ndim: int) -> Array:
        """Which positions are being made at t, as `alpha`: all, or those of a block."""
        time = self._time(t, ndim)
        return (
            (time > 0) & (time <= 1) if self.block_length else jnp.ones_like(time, bool)
        )

    def _time(self, t: Array, ndim: int, classes: bool = False) -> Array:
        """Equation 5 without its clip."""
        t = jnp.asarray(t, jnp.float32)
        if self.block_length:
            block = jnp.arange(self.spec.shape[0]) // self.block_length
            t = self.num_blocks * t[..., None] - (self.num_blocks - 1 - block)
            return t[..., None] if classes else t
        return lift(t, ndim + classes)

    def encode(self, x: Array) -> Array:
        """Returns data `[B, ...]` as tokens, int32."""
        if self.levels:
            x = jnp.round((x + 1) * (self.levels - 1) / 2)
            x = jnp.clip(x, 0, self.levels - 1)
        return jnp.asarray(x, jnp.int32)

    def decode(self, tokens: Array) -> Array:
        """Returns tokens `[B, ...]` as data: float32 in [-1, 1], or themselves."""
        if not self.levels:
            return tokens
        return tokens.astype(jnp.float32) * (2 / (self.levels - 1)) - 1

    def prior(self, key: Array, shape: tuple[int, ...], t: float = 1.0) -> Array:
        """Returns pure noise; of z at t < 1 it is what no data are left in."""
        if self.is_masked:
            return jnp.full(shape, self.mask, jnp.int32)
        return jax.random.randint(key, shape, 0, self.num_tokens)

    def prior_from(self, keys: Array, shape: tuple[int, ...], t: float = 1.0) -> Array:
        """Returns pure noise `[B, *shape]`: example i depends on `keys[i]` alone."""
        return jax.vmap(lambda key: self.prior(key, shape, t))(keys)

    def corrupt(self, key: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """Returns (z_t, which positions were resampled) of equation 1, as `x`."""
        keep_key, noise_key = jax.random.split(key)
        # Compared with the noise's share, which has more digits where it is small.
        uniform = jax.random.uniform(keep_key, x.shape)
        changed = uniform < self.one_minus_alpha(t, x.ndim)
        return jnp.where(changed, self.prior(noise_key, x.shape), x), changed

    def network_input(self, z_t: Array, t: Array) -> Array:
        """Returns what the network sees: z_t itself."""
        return z_t

    def is_noise(self, z_t: Array) -> Array:
        """Which positions of z_t a loss is summed over: masked ones, or all."""
        return z_t == self.mask if self.is_masked else jnp.ones_like(z_t, bool)

    def predict(self, raw: Array, z_t: Array, t: Array) -> CategoricalPrediction:
        """Returns log p(x_i | z_t) that a raw network output says.

        Args:
          raw: `[B, ..., K]`.
          z_t: `[B, ...]`.
          t: scalar or `[B]`.
        """
        logits = raw.astype(jnp.float32)
        if self.is_masked:
            # Scores, too, are the denoiser times a number.
            known = log_one_hot(z_t, self.num_tokens)
            hidden = jnp.expand_dims(z_t == self.mask, -1)
            logits = jnp.where(hidden, jax.nn.log_softmax(logits), known)
            return CategoricalPrediction(logits)
        if self.prediction == "score":
            # s_j ∝ alpha leave_one_out_j + (1 - alpha) / K, with s = 1 at z itself.
            logits = self._from_score(logits, z_t, t)
        if self.prediction != "denoiser":
            logits = logits + self._own(z_t, t)
        logits = jax.nn.log_softmax(logits)
        if self.block_length:
            # Blocks that are done are certain, whatever the network says of them.
            done = self.one_minus_alpha(t, z_t.ndim, True) <= 0
            logits = jnp.where(done, log_one_hot(z_t, self.num_tokens), logits)
        return CategoricalPrediction(logits)

    def leave_one_out(
        self, prediction: CategoricalPrediction, z_t: Array, t: Array
    ) -> Array:
        """Returns log p(x_i | z_t without i), `[B, ..., K]`: equation 4, backwards.

        Of masked tokens it is the prediction itself, known tokens being certain.
        """
        if self.is_masked:
            return prediction.logits
        return jax.nn.log_softmax(prediction.logits - self._own(z_t, t))

    def _own(self, z_t: Array, t: Array) -> Array:
        """Returns log(alpha [k = z] + (1 - alpha) / K), `[B, ..., K]`."""
        alpha, noise = self._shares(t, z_t.ndim)
        own = jax.nn.one_hot(z_t, self.num_tokens)
        return jnp.log(alpha * own + jnp.maximum(noise / self.num_tokens, _TINY))

    def _shares(self, t: Array, ndim: int, classes: bool = True) -> tuple[Array, Array]:
        """Returns alpha and 1 - alpha."""
        return self.alpha(t, ndim, classes), self.one_minus_alpha(t, ndim, classes)

    def _from_score(self, logits: Array, z_t: Array, t: Array) -> Array:
        """Returns log leave_one_out of log scores under uniform noise."""
        own = jax.nn.one_hot(z_t, self.num_tokens)
        share = jax.nn.softmax(jnp.where(own > 0, 0.0, logits))
        alpha, noise = self._shares(t, z_t.ndim)
        left = (share - noise / self.num_tokens) / jnp.maximum(alpha, _TINY)
        return jnp.log(jnp.maximum(left, _TINY))

    def log_marginal(self, log_x: Array, t: Array) -> Array:
        """Returns log(alpha x + (1 - alpha) pi), `[B, ..., num_symbols]`.

        Args:
          log_x: `[B, ..., K]`, log-probabilities of the clean token.
          t: scalar or `[B]`.
        """
        alpha, noise = self._shares(t, log_x.ndim - 1)
        log_alpha = jnp.log(jnp.maximum(alpha, _TINY))
        log_noise = jnp.log(jnp.maximum(noise, _TINY))
        if self.is_masked:
            mask = jnp.broadcast_to(log_noise, (*log_x.shape[:-1], 1))
            return jnp.concatenate([log_x + log_alpha, mask], axis=-1)
        return jnp.logaddexp(log_x + log_alpha, log_noise - jnp.log(self.num_tokens))

    def posterior(self, log_x: Array, z_t: Array, t: Array, s: Array) -> Array:
        """Returns log q(z_s | z_t, x), `[B, ..., num_symbols]`: equation 2.

        Args:
          log_x: `[B, ..., K]`, log of a one-hot x, or of `leave_one_out`.
          z_t: `[B, ...]`.
          t, s: scalars or `[B]`, s < t.
        """
        if self.is_masked:
            log_u, log_stay = self.log_reveal(t, s, z_t.ndim, True)
            stay = jnp.broadcast_to(log_stay, (*log_x.shape[:-1], 1))
            hidden = jnp.concatenate([log_x + log_u, stay], axis=-1)
            seen = log_one_hot(z_t, self.num_symbols)
            return jnp.where(jnp.expand_dims(z_t == self.mask, -1), hidden, seen)
        own = jax.nn.one_hot(z_t, self.num_tokens)
        keep, gone = self.change(t, s, z_t.ndim, True)
        back = jnp.log(jnp.maximum(keep * own + gone / own.shape[-1], _TINY))
        return jax.nn.log_softmax(back + self.log_marginal(log_x, s))

    def change(
        self, t: Array, s: Array, ndim: int, classes: bool = False
    ) -> tuple[Array, Array]:
        """Returns a = alpha_t / alpha_s and 1 - a, as `alpha`; s < t.

        The difference has no cancellation where both are near 1. A block that is still
        to come does not change.
        """
        alpha_t, noise_t = self._shares(t, ndim, classes)
        alpha_s, noise_s = self._shares(s, ndim, classes)
        is_left, divisor = alpha_s > 0, jnp.maximum(alpha_s, _TINY)
        kept = jnp.where(is_left, alpha_t / divisor, 1.0)
        gone = (noise_t - noise_s) / divisor
        return kept, jnp.where(is_left, gone, 0.0)

    def log_reveal(
        self, t: Array, s: Array, ndim: int, classes: bool = False
    ) -> tuple[Array, Array]:
        """Returns log u and log(1 - u) of equation 3, as `alpha`; s < t."""
        noise_t = jnp.maximum(self.one_minus_alpha(t, ndim, classes), _TINY)
        noise_s = self.one_minus_alpha(s, ndim, classes)
        stay = jnp.clip(noise_s / noise_t, 0.0, 1.0)
        return (
            jnp.log(jnp.maximum((noise_t - noise_s) / noise_t, _TINY)),
            jnp.log(jnp.maximum(stay, _TINY)),
        )

    def step(self, key: Array, x: Array, z_t: Array, t: Array, s: Array) -> Array:
        """Returns z_s ~ q(z_s | z_t, x) for tokens x `[B, ...]`: equation 2.

        An x that contradicts a token which is not masked has no posterior; the token
        stays.
        """
        if not self.is_masked:
            log_x = log_one_hot(x, self.num_tokens)
            return draw(key, self.posterior(log_x, z_t, t, s))
        # A coin for each position, in the place of K + 1 probabilities.
        coin = reversed(self.log_reveal(t, s, z_t.ndim))
        coin = jnp.broadcast_to(jnp.stack([*coin], axis=-1), (*z_t.shape, 2))
        return jnp.where((z_t == self.mask) & (draw(key, coin) > 0), x, z_t)


def draw(key: Array, logits: Array) -> Array:
    """Returns tokens `[...]` by log-probabilities `[..., K]`.

    In float32 the usual noise never exceeds 16: rare tokens would never come, which
    lowers the temperature unseen. The mode 'high' has no such bound.
    """
    logits = logits.astype(jnp.float32)
    return jax.random.categorical(key, logits, mode="high").astype(jnp.int32)


def log_one_hot(tokens: Array, num: int) -> Array:
    """Returns log of the one-hot `[..., num]`, log 1e-30 for 0 and beyond it."""
    return jnp.log(jnp.maximum(jax.nn.one_hot(tokens, num), _TINY))
