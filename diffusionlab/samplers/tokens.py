"""Samplers of tokens: from masks, or random tokens, to data.

With x_hat = p(x_i | z_t), what the network says of each position by itself, and
u = (alpha_s - alpha_t) / (1 - alpha_t), one step from t to s < t:

    masked    a mask becomes a token by x_hat with probability u; a token stays     (1)
    uniform   x ~ x_hat, then z_s ~ q(z_s | z_t, x)                                 (2)

Both have, position by position, the law q(z_s | z_t, x) averaged over x ~ x_hat. That
is `posterior` of the process with `leave_one_out` in the place of x: the law (3), and
what SEDD's analytic step comes to with the score of the same denoiser. So one draw by
(3) is another way to take the same step. Positions are drawn independently, which is
wrong by an amount that falls as 1 / num_steps.

`temperature` tau and `top_p` change x_hat before that: it becomes x_hat^(1/tau), then
the likeliest tokens that make up top_p of it. 1 and 1 sample what was learned.

The last step goes to clean data, whatever alpha the schedule ends with: what is left is
drawn by x_hat.

Source: Sahoo et al. 2024, MDLM (arXiv 2406.07524), and Shi et al. 2024, MD4
(arXiv 2406.04329), for (1); Austin et al. 2021, D3PM (arXiv 2107.03006), for (2); Lou
et al. 2023, SEDD (arXiv 2310.16834), theorem 4.2, for the analytic step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.processes import categorical
from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, CategoricalPrediction, DataSpec, Predict, Process

_NEVER = -1e9  # a log-probability: exp of it is 0, and it is not infinite


def check_options(num_steps: int, temperature: float, top_p: float) -> None:
    """Raises ValueError unless num_steps >= 1, temperature > 0 and 0 < top_p <= 1."""
    base.check_num_steps(num_steps)
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be in (0, 1], got {top_p}.")


def check_masked(process: Process, field: str, what: str) -> None:
    """Raises ValueError unless tokens are masked, in the name of a field."""
    if not process.is_masked:
        raise ValueError(
            f"{field}: {what} is for masked tokens, and config.process.noise is "
            f"'{process.noise}'; take 'token_ancestral' or 'token_tweedie'."
        )


def check_one_block(process: Process, field: str, what: str) -> None:
    """Raises ValueError where tokens are made in blocks, in the name of a field."""
    if process.block_length:
        raise ValueError(
            f"{field}: {what} makes all tokens at a time, and "
            f"config.process.block_length is {process.block_length}; take "
            "'token_ancestral' or 'token_tweedie'."
        )


def check_steps(process: Process, num_steps: int, grid: grids.Grid | None) -> None:
    """Raises ValueError unless each block of a text gets as many equal steps."""
    count = process.num_blocks
    if num_steps % count:
        raise ValueError(
            f"num_steps: must be a multiple of {count}, the number of blocks that "
            f"config.process.block_length makes, got {num_steps}."
        )
    if count > 1 and not isinstance(grid or grids.Uniform(), grids.Uniform):
        raise ValueError(
            "grid: its steps are not the same in each block, which "
            "config.process.block_length needs; leave it out."
        )


def nucleus(log_x: Array, top_p: float) -> Array:
    """Returns which tokens are the likeliest that make up `top_p`, as `log_x`, bool.

    A token is kept if those likelier than it make up less than top_p. Tokens as likely
    as the last one kept are kept with it: nothing tells them apart.

    Args:
      log_x: `[..., K]`, normalised.
      top_p: in (0, 1].
    """
    ordered = -jnp.sort(-log_x, axis=-1)
    before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    kept = jnp.where(before < top_p, ordered, jnp.inf)
    return log_x >= jnp.min(kept, axis=-1, keepdims=True)


def sharpened(log_x: Array, temperature: float, top_p: float) -> Array:
    """Returns x_hat^(1 / temperature) within its `nucleus`, `[..., K]`, normalised."""
    if temperature != 1:
        log_x = jax.nn.log_softmax(log_x / temperature)
    if top_p < 1:
        log_x = jnp.where(nucleus(log_x, top_p), log_x, _NEVER)
        log_x = jax.nn.log_softmax(log_x)
    return log_x


def law(process: Process, log_x: Array, z_t: Array, t: Array, s: Array) -> Array:
    """Returns log p(z_s | z_t), `[B, ..., num_symbols]`, of each position: law 3.

    Args:
      process: of tokens.
      log_x: `[B, ..., K]`, log x_hat: a denoiser, not without its own position.
      z_t: `[B, ...]`.
      t, s: scalars, s < t; s = 0 is clean data.
    """
    left = process.leave_one_out(CategoricalPrediction(log_x), z_t, t)
    found = process.posterior(left, z_t, t, s)
    return jnp.where(base.is_last(s), clean(process, log_x, z_t), found)


def clean(process: Process, log_x: Array, z_t: Array) -> Array:
    """Returns log x_hat, `[B, ..., num_symbols]`: no masks, what is known as it is.

    Under uniform noise nothing is known. Under masked noise x_hat has it already,
    unless a temperature has softened it.
    """
    if not process.is_masked:
        return log_x
    mask = jnp.full((*log_x.shape[:-1], 1), _NEVER)
    open_ = jnp.concatenate([log_x, mask], axis=-1)
    known = jnp.where(jax.nn.one_hot(z_t, process.num_symbols) > 0, 0.0, _NEVER)
    return jnp.where(jnp.expand_dims(z_t == process.mask, -1), open_, known)


def draw(keys: Array, log_x: Array) -> Array:
    """Returns tokens `[B, ...]` by `[B, ..., K]`, example i from `keys[i]`."""
    return jax.vmap(categorical.draw)(keys, log_x)


def toss(keys: Array, log_yes: Array, log_no: Array, shape: tuple[int, ...]) -> Array:
    """Returns coins `[B, *shape]`, true with probability exp(log_yes), from `[B]` keys.

    Args:
      keys: `[B]`.
      log_yes, log_no: scalars or `[*shape]`, of probabilities that sum to 1.
      shape: of one example.
    """
    logits = jnp.stack(jnp.broadcast_arrays(log_no, log_yes), axis=-1)
    logits = jnp.broadcast_to(logits, (*shape, 2))
    return jax.vmap(categorical.draw, (0, None))(keys, logits) > 0


def reveal(process: Process, z_t: Array, t: Array, s: Array, keys: Array) -> Array:
    """Returns which masked positions equation 1 reveals, `[B, ...]`; at s = 0 all."""
    log_u, log_stay = process.log_reveal(t, s, z_t.ndim - 1)
    coins = toss(keys, log_u, log_stay, z_t.shape[1:])
    return (z_t == process.mask) & (coins | base.is_last(s))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenAncestral:
    """Equation 1 or 2, as the noise is: one network evaluation per step.

    Under masked noise the coin that reveals and the token are drawn apart, which is the
    one draw by [u x_hat, 1 - u]; the coins come first, and with `cached` the network is
    evaluated only where they reveal something. Samples are the same ones bit for bit,
    also with a network that knows the time. Between such steps nothing changes, so this
    saves what a cache of x_hat would. All examples of a batch are evaluated together:
    it saves where a whole batch stays as it is, with more steps than tokens in it.

    Attributes:
      num_steps: network evaluations, at most.
      grid: the times; None is uniform.
      temperature: tau; above 0.
      top_p: in (0, 1].
      cached: leave out evaluations that reveal nothing; masked noise only.

    Raises:
      ValueError: a number outside its range.
    """

    num_steps: int
    grid: grids.Grid | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    cached: bool = False

    processes = ("categorical",)
    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        check_options(self.num_steps, self.temperature, self.top_p)

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError for steps across blocks, and `cached` of uniform noise."""
        check_steps(process, self.num_steps, self.grid)
        if self.cached and not process.is_masked:
            raise ValueError(
                "cached: leaves out evaluations that reveal no masked token, and "
                f"config.process.noise is '{process.noise}'; use False."
            )

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s < t, both scalars; `keys` is `[B]`."""
        x_keys, z_keys = base.fold(keys, 0), base.fold(keys, 1)

        def drawn(z_t: Array) -> Array:
            log_x = predict(z_t, t).logits
            return draw(x_keys, sharpened(log_x, self.temperature, self.top_p))

        if not process.is_masked:
            x = drawn(state.z)
            move = jax.vmap(process.step, (0, 0, 0, None, None))
            return base.State(move(z_keys, x, state.z, t, s), x)
        revealed = reveal(process, state.z, t, s, z_keys)
        if self.cached:
            x = jax.lax.cond(jnp.any(revealed), drawn, lambda z_t: z_t, state.z)
        else:
            x = drawn(state.z)
        z = jnp.where(revealed, x, state.z)
        return base.State(z, z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTweedie:
    """One draw by law 3, SEDD's analytic step; the same law as `TokenAncestral`.

    With a score s, e^(-d Q) s times the probability of the way back is, for both
    noises, q(z_s | z_t, x) with `leave_one_out` in the place of x. The score is that of
    the normalised denoiser, also where a network answers scores: their sum over tokens,
    which SEDD lets differ from alpha / (1 - alpha), is not used.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      temperature: tau; above 0.
      top_p: in (0, 1].

    Raises:
      ValueError: a number outside its range.
    """

    num_steps: int
    grid: grids.Grid | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    processes = ("categorical",)
    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        check_options(self.num_steps, self.temperature, self.top_p)

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError for steps across blocks."""
        check_steps(process, self.num_steps, self.grid)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s < t, both scalars; `keys` is `[B]`."""
        log_x = predict(state.z, t).logits
        log_x = sharpened(log_x, self.temperature, self.top_p)
        z = draw(keys, law(process, log_x, state.z, t, s))
        return base.State(z, z)
