"""Samplers of tokens with exact denoisers: their whole output distribution is known."""

from unittest import mock

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pushed
import pytest

from diffusionlab import registry
from diffusionlab.processes import categorical
from diffusionlab.samplers import base, grids, tokens
from diffusionlab.samplers.token_orders import TokenRemasking
from diffusionlab.samplers.tokens import TokenAncestral, TokenTweedie
from diffusionlab.schedules import alpha

CHAIN, BITS = enumerated.chain(), enumerated.bits()
MASKED, UNIFORM = (pushed.process(CHAIN, noise) for noise in ("masked", "uniform"))
NUM_STEPS = (1, 2, 4, 8, 16, 32, 64)
SAMPLERS = [name for name in registry.table("sampler") if name.startswith("token_")]
N = 20_000
T, S = np.float32(0.7), np.float32(0.4)


def build(name, **options):
    block = {"name": name, "num_steps": 4, **options}
    return registry.build("sampler", block, "config.sampler")


def wrong(process, log_x, z_t, t, s):
    """The denoiser in the place of x: it is not what the posterior takes."""
    return process.posterior(log_x, z_t, t, s)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=lambda p: p.noise)
def test_oracle_is_the_denoiser_by_enumeration(process):
    z = pushed.states(CHAIN, process)[[0, 5, 14, 26]]
    found = np.exp(pushed.oracle(CHAIN, process)(z, 0.7).logits)
    mask = process.mask if process.is_masked else None
    wanted = [CHAIN.denoiser(row, 0.3, mask) for row in z]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "process, law, grid, wanted",
    [
        (MASKED, tokens.law, None,
         (0.429471, 0.225279, 0.115518, 0.058478, 0.029419, 0.014755)),
        (pushed.process(CHAIN, "masked", alpha.Cosine()), tokens.law, None,
         (0.429471, 0.239216, 0.128433, 0.065996, 0.033372, 0.016770)),
        (MASKED, tokens.law, grids.Cosine(),
         (0.429471, 0.239216, 0.128433, 0.065996, 0.033372, 0.016770)),
        (UNIFORM, tokens.law, None,
         (0.429471, 0.266736, 0.135659, 0.063805, 0.030158, 0.014553, 0.007135)),
        (UNIFORM, wrong, None,
         (0.429471, 0.310118, 0.286317, 0.278917, 0.276359, 0.275464, 0.275125)),
    ],
    ids=["masked", "cosine_schedule", "cosine_grid", "uniform", "wrong"],
)  # fmt: skip
def test_total_variation_of_the_chain(process, law, grid, wanted):
    sampler = pushed.Pushed(CHAIN, process, law)
    found = [sampler.error(n, grid) for n in NUM_STEPS[: len(wanted)]]
    # Six digits are given; float32 keeps as many.
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_total_variation_of_equal_bits():
    masked = pushed.Pushed(BITS, pushed.process(BITS, "masked"))
    found = [masked.error(n) for n in (1, 2, 4, 8)]
    np.testing.assert_allclose(found, (0.5, 0.25, 0.125, 0.0625), atol=2e-6)
    # Whatever the grid, half the sum of squared steps of alpha.
    times = np.array((1.0, 0.7, 0.65, 0.2, 0.0))
    found = masked.error(4, grids.Custom(times=tuple(times)))
    assert found == pytest.approx(0.5 * np.sum(np.diff(times) ** 2), abs=2e-6)
    uniform = pushed.Pushed(BITS, pushed.process(BITS, "uniform"))
    wanted = (0.5, 0.34, 0.197961, 0.10354, 0.05193, 0.025734, 0.012741)
    np.testing.assert_allclose([uniform.error(n) for n in NUM_STEPS], wanted, atol=2e-6)


@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_one_step_is_exact_for_independent_tokens(noise):
    joint = enumerated.product([0.1, 0.2, 0.7], [0.5, 0.5, 0.0])
    assert pushed.Pushed(joint, pushed.process(joint, noise)).error(1) < 1e-6


def rates(process, dsigma):
    """e^(d Q) `[M, M]`, rows from: the forward step of SEDD by total noise dsigma."""
    m, stay = process.num_symbols, np.exp(-dsigma)
    target = np.full((m, m), 1 / m)
    if process.is_masked:
        target = np.eye(m)[[process.mask] * m]
    return stay * np.eye(m) + (1 - stay) * target


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=lambda p: p.noise)
def test_the_law_is_the_analytic_step_of_scores(process):
    z = pushed.states(CHAIN, process)
    log_x = pushed.oracle(CHAIN, process)(z, T).logits
    found = np.exp(np.float64(tokens.law(process, log_x, z, T, S)))
    # q_t of every state, and the score: q_t with one symbol changed, over q_t.
    one = rates(process, -np.log(1 - np.float64(T)))[: CHAIN.num_tokens]
    q = np.einsum("abc,ax,by,cz->xyz", CHAIN.table, one, one, one)
    forward = rates(process, np.log((1 - np.float64(S)) / (1 - np.float64(T))))
    for row, state in enumerate(z):
        for i, symbol in enumerate(state):
            if process.is_masked and symbol != process.mask:
                continue  # nothing leaves it
            around = tuple(slice(None) if j == i else state[j] for j in range(3))
            score = q[around] / q[tuple(state)]
            staggered = score @ np.linalg.inv(forward)
            wanted = staggered * forward[:, symbol]
            np.testing.assert_allclose(found[row, i], wanted, atol=2e-6)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=lambda p: p.noise)
def test_the_law_is_the_mixture_over_drawn_tokens(process):
    z = pushed.states(CHAIN, process)
    log_x = pushed.oracle(CHAIN, process)(z, T).logits
    one_hot = categorical.log_one_hot(jnp.arange(3), 3)
    of = [
        np.exp(process.posterior(jnp.broadcast_to(row, log_x.shape), z, T, S))
        for row in one_hot
    ]
    wanted = sum(np.exp(log_x[..., k : k + 1]) * of[k] for k in range(3))
    found = np.exp(tokens.law(process, log_x, z, T, S))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def law_of(sampler):
    return sampler.law if isinstance(sampler, TokenRemasking) else tokens.law


@pytest.mark.parametrize(
    "process, sampler",
    [
        (MASKED, TokenAncestral(num_steps=1)),
        (MASKED, TokenAncestral(num_steps=1, cached=True)),
        (UNIFORM, TokenAncestral(num_steps=1, temperature=0.7)),
        (MASKED, TokenTweedie(num_steps=1)),
        (UNIFORM, TokenTweedie(num_steps=1, top_p=0.8)),
        (MASKED, TokenRemasking(num_steps=1, cap=0.4)),
    ],
    ids=lambda q: q.noise if hasattr(q, "noise") else f"{type(q).__name__}",
)
def test_a_step_draws_by_its_law(process, sampler):
    row = np.array([[process.num_symbols - 1, 0, process.num_symbols - 1]], np.int32)
    predict = pushed.oracle(CHAIN, process)
    log_x = tokens.sharpened(predict(row, T).logits, sampler.temperature, sampler.top_p)
    log_p = law_of(sampler)(process, log_x, row, T, S)
    p = np.exp(np.float64(log_p[0]))
    keys = jax.random.split(jax.random.key(0), N)
    z = jnp.broadcast_to(row, (N, 3))
    step = jax.jit(
        lambda z, keys: sampler.step(process, predict, base.State(z, z), T, S, keys).z
    )
    wanted = np.einsum("a,b,c->abc", *p).reshape(-1)
    pushed.check_counts(step(z, keys), wanted, process.num_symbols)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=lambda p: p.noise)
def test_the_loop_draws_what_the_steps_make(process):
    keys = jax.random.split(jax.random.key(1), N)
    sampler = TokenAncestral(num_steps=2)
    predict = pushed.oracle(CHAIN, process)
    x = jax.jit(lambda k: base.sample(sampler, process, predict, k, (3,)))(keys)
    pushed.check_counts(x, pushed.Pushed(CHAIN, process).output(2), 3)
    some = base.sample(sampler, process, predict, keys[5:8], (3,))
    np.testing.assert_array_equal(some, x[5:8])


@pytest.mark.parametrize(
    "name, noise",
    [
        *((name, "masked") for name in SAMPLERS),
        ("token_ancestral", "uniform"),
        ("token_tweedie", "uniform"),
    ],
)
def test_samples_are_tokens_whatever_alpha_ends_with(name, noise):
    process = pushed.process(BITS, noise, alpha.Linear(end=0.2))
    sampler = build(name)
    keys = jax.random.split(jax.random.key(2), 256)
    # A network that knows: whatever is noise in z_0 is gone.
    one = jnp.log(jnp.array([1e-30, 1.0]))

    def predict(z_t, t):
        return process.predict(jnp.broadcast_to(one, (*z_t.shape, 2)), z_t, t)

    x = jax.jit(lambda k: base.sample(sampler, process, predict, k, (2, 1, 3)))(keys)
    np.testing.assert_array_equal(x, np.ones((256, 2, 1, 3)))
    assert x.dtype == jnp.int32


def test_cached_leaves_out_evaluations_that_reveal_nothing():
    predict, asked = pushed.oracle(CHAIN, MASKED), []

    def counted(z_t, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t)
        return predict(z_t, t)

    keys = jax.random.split(jax.random.key(3), 2)
    found, evaluations = [], []
    for cached in (False, True):
        asked.clear()
        sampler = TokenAncestral(num_steps=40, cached=cached)
        found.append(base.sample(sampler, MASKED, counted, keys, (3,)))
        jax.effects_barrier()
        evaluations.append(len(asked))
    np.testing.assert_array_equal(*found)
    # Two samples of three tokens change at six steps at most.
    assert evaluations[0] == 40 and 1 <= evaluations[1] <= 6


def test_nucleus_and_temperature():
    p = jnp.array([[0.5, 0.2, 0.2, 0.1], [0.05, 0.15, 0.3, 0.5]])
    kept = {
        0.4: [[1, 0, 0, 0], [0, 0, 0, 1]],
        0.6: [[1, 1, 1, 0], [0, 0, 1, 1]],  # tokens as likely stay together
        0.85: [[1, 1, 1, 0], [0, 1, 1, 1]],
        1.0: [[1, 1, 1, 1], [1, 1, 1, 1]],
    }
    for top_p, wanted in kept.items():
        np.testing.assert_array_equal(tokens.nucleus(jnp.log(p), top_p), wanted)
    # The temperature first: of p² the likeliest make up 0.735 and 0.685.
    found = np.exp(tokens.sharpened(jnp.log(p), 0.5, 0.8))
    wanted = np.array([[0.25, 0.04, 0.04, 0], [0, 0, 0.09, 0.25]])
    np.testing.assert_allclose(found, wanted / wanted.sum(1)[:, None], rtol=1e-5)
    assert tokens.sharpened(p, 1.0, 1.0) is p


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_temperature_softens_a_revealed_token(name):
    keys = jax.random.split(jax.random.key(4), 64)
    sampler = build(name, temperature=100.0)
    z = jnp.broadcast_to(jnp.array([2, 3, 3]), (64, 3))
    last = jnp.float32(0)
    predict = pushed.oracle(CHAIN, MASKED)
    step = jax.jit(
        lambda z: sampler.step(MASKED, predict, sampler.init(z, T), T, last, keys)
    )
    found = np.asarray(sampler.final(step(z)))
    assert np.all(found[:, 0] == 2) and found.max() < 3 and len(np.unique(found)) == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_draw_is_in_low_precision(name):
    sampler, modes = build(name), []
    seen = {"categorical": jax.random.categorical, "gumbel": jax.random.gumbel}

    def spy(which):
        def call(*args, **kw):
            modes.append(kw.get("mode"))
            return seen[which](*args, **kw)

        return call

    z = jnp.full((2, 3), MASKED.mask)
    keys = jax.random.split(jax.random.key(0), 2)
    with (
        mock.patch.object(jax.random, "categorical", spy("categorical")),
        mock.patch.object(jax.random, "gumbel", spy("gumbel")),
    ):
        predict = pushed.oracle(CHAIN, MASKED)
        jax.eval_shape(
            lambda: sampler.step(MASKED, predict, sampler.init(z, T), T, S, keys)
        )
    assert modes and set(modes) == {"high"}


def test_what_does_not_suit_is_refused():
    for name in ("token_remasking", "token_confidence"):
        with pytest.raises(ValueError, match=f"name: '{name}' is for masked tokens"):
            build(name).check(UNIFORM, UNIFORM.spec)
    with pytest.raises(
        ValueError, match="cached: leaves out evaluations that rev.*use Fal"
    ):
        build("token_ancestral", cached=True).check(UNIFORM, UNIFORM.spec)
    for options, said in (
        ({"num_steps": 0}, "num_steps: must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: must be positive, got 0.0"),
        ({"top_p": 1.5}, r"top_p: must be in \(0, 1\], got 1.5"),
    ):
        for name in SAMPLERS:
            with pytest.raises(ValueError, match=said):
                build(name, **options)
    with pytest.raises(ValueError, match=r"cap: must be in \[0, 1\], got 2"):
        build("token_remasking", cap=2.0)
    with pytest.raises(ValueError, match="choice_temperature: must be at least 0"):
        build("token_confidence", choice_temperature=-1.0)


def test_the_cosine_grid():
    found = build("token_ancestral", grid={"name": "cosine"}).times(MASKED.schedule)
    wanted = np.cos(np.pi / 2 * np.arange(5) / 4)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    assert found[-1] == 0
