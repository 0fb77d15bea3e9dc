"""Text block by block: the same bound and samplers, up to autoregression."""

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pushed
import pytest

from diffusionlab import registry
from diffusionlab.objectives.discrete import Discrete, nelbo
from diffusionlab.samplers import base, fixed, grids
from diffusionlab.samplers.tokens import TokenAncestral, TokenTweedie
from diffusionlab.schedules.times import Uniform
from diffusionlab.types import DataSpec, Inputs, Network

CHAIN = enumerated.chain()
NOISES = ("masked", "uniform")
# Four bits that all depend on each other.
FOUR = enumerated.Joint(
    np.random.default_rng(0).dirichlet(np.ones(16)).reshape((2,) * 4)
)


@pytest.mark.parametrize("noise", NOISES)
def test_blocks_become_clean_one_after_the_other(noise):
    process = pushed.process(FOUR, noise, block_length=2)
    t = jnp.float32([1.0, 0.75, 0.5, 0.25, 0.0])
    wanted = [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1]]
    np.testing.assert_allclose(process.alpha(t, 2)[:, ::2], wanted, atol=1e-6)
    np.testing.assert_allclose(
        process.one_minus_alpha(t, 2), 1 - process.alpha(t, 2), atol=1e-6
    )
    # Each t has one block in work; its time runs as often as there are blocks.
    slopes = process.alpha_derivative(jnp.float32([0.9, 0.6, 0.4, 0.1]), 2)
    np.testing.assert_allclose(slopes[:, ::2], -2 * np.repeat(np.eye(2), 2, axis=0))
    x = jnp.zeros((4000, 4), jnp.int32)
    _, changed = process.corrupt(jax.random.key(0), x, jnp.float32(0.25))
    share = np.asarray(changed).mean(axis=0)
    assert np.all(share[:2] == 0)
    np.testing.assert_allclose(share[2:], 0.5, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("noise", NOISES)
def test_blocks_of_one_token_are_exact_autoregression(noise):
    sampler = pushed.Pushed(CHAIN, pushed.process(CHAIN, noise, block_length=1))
    for num_steps in (3, 6):
        assert sampler.error(num_steps) < 2e-6
    assert pushed.Pushed(CHAIN, pushed.process(CHAIN, noise)).error(3) > 0.1


@pytest.mark.parametrize("noise", NOISES)
def test_a_step_for_each_block_makes_its_tokens_independent(noise):
    sampler = pushed.Pushed(FOUR, pushed.process(FOUR, noise, block_length=2))
    first = FOUR.table.sum(axis=(2, 3))
    rest = FOUR.table / first[..., None, None]
    wanted = np.einsum(
        "a,b,abc,abd->abcd",
        first.sum(1), first.sum(0), rest.sum(3), rest.sum(2),
    )  # fmt: skip
    np.testing.assert_allclose(sampler.output(2), wanted.reshape(-1), atol=2e-6)
    # Steps within blocks make up for it.
    errors = [sampler.error(num_steps) for num_steps in (2, 8, 32)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("noise", NOISES)
def test_one_block_is_none(noise):
    whole, none = (pushed.process(CHAIN, noise, block_length=b) for b in (3, 0))
    found = [pushed.Pushed(CHAIN, process).output(4) for process in (whole, none)]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("num_timesteps", [0, 6])
@pytest.mark.parametrize("noise", NOISES)
def test_the_bound_is_the_probability(noise, num_timesteps):
    process = oracles.process_of(CHAIN, noise, block_length=1)
    count, row = 40_000, [2, 1, 0]
    t = jnp.asarray(np.random.default_rng(0).permutation(count) + 0.5) / count
    predict = oracles.oracle(CHAIN, process)
    found = jax.jit(
        lambda x, t: nelbo(process, predict, jax.random.key(0), x, t, num_timesteps)
    )(jnp.broadcast_to(jnp.int32(row), (count, 3)), t)
    # In T steps as well: a token has no other in its block to depend on.
    exact, spread = -CHAIN.log_prob(row), np.std(found) / np.sqrt(count)
    assert spread < 0.05 * exact
    assert abs(found.mean() - exact) < 4 * spread


def test_a_beginning_of_uniform_noise_stays():
    process = pushed.process(CHAIN, "uniform", block_length=1)
    sampler = fixed.Fixed(
        sampler=TokenAncestral(num_steps=3),
        tokens=np.array([2, 0, 0]),
        known=np.array([True, False, False]),
        repeats=2,
    )
    keys = jax.random.split(jax.random.key(0), 4000)
    predict = pushed.oracle(CHAIN, process)
    x = np.asarray(base.sample(sampler, process, predict, keys, (3,)), int)
    wanted = CHAIN.table[2].reshape(-1) / CHAIN.table[2].sum()
    found = np.bincount(x[:, 1] * 3 + x[:, 2], minlength=9) / len(x)
    # Half the sum of nine deviations of sqrt(p / N), at four of them.
    assert np.abs(found - wanted).sum() / 2 < 2 * np.sqrt(wanted / len(x)).sum()


@pytest.mark.parametrize("sampler", [TokenAncestral, TokenTweedie])
@pytest.mark.parametrize("prediction", ["denoiser", "leave_one_out"])
def test_what_is_done_stays_whatever_a_network_says_of_it(sampler, prediction):
    process = oracles.process_of(FOUR, "uniform", prediction=prediction, block_length=2)
    x = jnp.broadcast_to(jnp.int32([0, 1]), (500, 2))
    z = jnp.concatenate([x, 1 - x], axis=1)

    def predict(z_t, t):  # it takes every second token for another
        return process.predict(jnp.zeros((*z_t.shape, 2)), z_t, t)

    times = np.float32(np.linspace(0.5, 0, 9))
    keys = jax.random.split(jax.random.key(0), len(z))
    state = base.solve(sampler(num_steps=8), process, predict, z, times, keys)
    np.testing.assert_array_equal(state.x[:, :2], x)
    assert 0.3 < np.mean(state.x[:, 2:] == z[:, 2:]) < 0.7


@pytest.mark.parametrize("loss", ["cross_entropy", "elbo"])
def test_a_loss_is_of_the_block_in_work(loss):
    """Two independent bits, of which the network knows the odds of the second alone."""
    odds = jnp.log(jnp.float32([[0.5, 0.5], [0.9, 0.1]]))
    network = Network(
        lambda key: {},
        lambda params, z, cond, train=False, key=None: jnp.broadcast_to(
            odds, (*z.shape, 2)
        ),
        (),
    )
    spec = DataSpec((2,), num_tokens=2)
    joint = enumerated.bits()
    count, min_t = 40_000, 0.2
    objective = Discrete(
        process=oracles.process_of(joint, "masked", block_length=1),
        networks={"denoiser": network},
        spec=spec,
        times=Uniform(),
        loss=loss,
        min_t=min_t,
    )
    x = {"x": jnp.zeros((count, 2), jnp.int32)}
    params = {"denoiser": {}}
    found, metrics = jax.jit(objective.train_loss)(
        params, Inputs(x, jax.random.key(0), jnp.int32(0), params, {})
    )
    nats = -float(odds[:, 0].mean())
    # Of a token in work masked with probability t: the bound, or the mean of t; what
    # is below min_t is at min_t.
    share = (1 - min_t**2) / 2 + min_t**2 if loss == "cross_entropy" else 1.0
    # Weights of at most 1 / min_t, half of the tokens: a spread of about twice nats.
    assert float(found) == pytest.approx(share * nats, abs=8 * nats / count**0.5)
    total, number = metrics["cross_entropy"]
    assert float(total / number) == pytest.approx(nats, rel=0.05)


def test_what_does_not_suit_is_refused():
    with pytest.raises(
        ValueError, match=r"block_length: must divide .* got 2, and .* \(3,\)"
    ):
        pushed.process(CHAIN, block_length=2)
    with pytest.raises(ValueError, match="block_length: scores are of a whole text"):
        oracles.process_of(CHAIN, "uniform", prediction="score", block_length=1)
    process = pushed.process(CHAIN, block_length=1)
    for name in ("token_remasking", "token_confidence"):
        sampler = registry.build("sampler", {"name": name, "num_steps": 3}, "s")
        with pytest.raises(ValueError, match=f"name: '{name}' makes all tokens at a"):
            sampler.check(process, process.spec)
    for sampler in (TokenAncestral, TokenTweedie):
        with pytest.raises(ValueError, match="num_steps: must be a multiple of 3.*4"):
            sampler(num_steps=4).check(process, process.spec)
        with pytest.raises(ValueError, match="grid: its steps are not the same"):
            sampler(num_steps=6, grid=grids.Cosine()).check(process, process.spec)
        sampler(num_steps=6, grid=grids.Uniform()).check(process, process.spec)
    for known, fits in (((1, 1, 0), True), ((0, 0, 1), False), ((1, 0, 1), False)):
        given = fixed.Fixed(
            sampler=TokenAncestral(num_steps=3),
            tokens=np.zeros(3, int),
            known=np.array(known, bool),
        )
        if fits:
            given.check(process, process.spec)
            continue
        with pytest.raises(ValueError, match="tokens: with config.process.block_len"):
            given.check(process, process.spec)
