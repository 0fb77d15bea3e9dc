"""The objective of tokens: what it minimises, its metrics, and what it refuses."""

import dataclasses
import math

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from diffusionlab.objectives import discrete_losses as losses
from diffusionlab.objectives.discrete import Discrete
from diffusionlab.schedules.times import Discrete as ChainTimes
from diffusionlab.schedules.times import LogitNormal, Uniform
from diffusionlab.types import DataSpec, Inputs, Network

CHAIN = enumerated.chain()
K = CHAIN.num_tokens
SPEC = DataSpec(shape=(3,), num_tokens=K)
# Every loss with every process that it is for.
FITTING = [
    (loss, noise, prediction)
    for loss in ("elbo", "score_entropy", "steps", "hybrid", "cross_entropy")
    for noise in ("masked", "uniform")
    for prediction in ("denoiser", "leave_one_out", "score")
    if (loss == "score_entropy") <= (prediction == "score")
    if loss == "score_entropy" or prediction != "score" or noise == "masked"
]


@dataclasses.dataclass(frozen=True)
class At:
    """A law that always draws the same times."""

    t: tuple

    def sample(self, key, batch_size, schedule):
        return jnp.float32(self.t), jnp.ones(len(self.t))


def linear(params, z, cond, *, train=False, key=None):
    """Logits by token and position, a little of them by time."""
    own = jax.nn.one_hot(z, K + 1)
    raw = jnp.einsum("bls,slk->blk", own, params["w"])
    return raw * (1 + 0.1 * cond["t"][:, None, None])


def either(params, z, cond, **how):
    """The same of a network that scores targets."""
    logits = linear(params, z, cond)
    if "target" not in cond:
        return logits
    target = cond["target"][..., None]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=-1)[..., 0]


def weights(seed=0):
    return {"w": jax.random.normal(jax.random.key(seed), (K + 1, 3, K))}


def made(noise="masked", prediction="denoiser", apply=linear, targets=False, **changes):
    process = oracles.process_of(CHAIN, noise, prediction=prediction)
    network = Network(lambda key: {}, apply, (), scores_targets=targets)
    given = {
        "process": process,
        "networks": {"denoiser": network},
        "spec": SPEC,
        "times": Uniform(),
    }
    return Discrete(**(given | changes))


CAUSAL = Network(lambda key: {}, linear, (), is_causal=True)
WEIGHTED = {"loss": "cross_entropy", "weight": "elbo"}
UNIFORM_SCORES = {"noise": "uniform", "prediction": "score", "loss": "score_entropy"}


def exact(noise, prediction="denoiser"):
    """`apply` of a network that knows the chain."""
    process = oracles.process_of(CHAIN, noise)

    def apply(params, z, cond, *, train=False, key=None):
        return oracles.oracle(CHAIN, process)(z, cond["t"]).logits

    return apply


def data(count, seed=0):
    rows = np.random.default_rng(seed).choice(len(CHAIN.probs), count, p=CHAIN.probs)
    return jnp.asarray(CHAIN.sequences[rows], jnp.int32)


def inputs(x, key=0, **batch):
    return Inputs({"x": x, **batch}, jax.random.key(key), jnp.int32(0), {}, {})


def run(it, given, params=None):
    found = jax.jit(it.train_loss)({"denoiser": params or {}}, given)
    return float(found[0]), {k: np.asarray(a) / b for k, (a, b) in found[1].items()}


def test_it_has_one_role_and_one_phase():
    it = made()
    assert it.roles["denoiser"].network == "denoiser"
    assert it.phases["train"].trains == ("denoiser",) == it.samples_from
    assert it.phase(7) == "train"
    z = jnp.int32([[3, 0, 3]])
    t = jnp.float32(0.5)
    found = it.predict({"denoiser": weights()}, z, t, {}).logits
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-6)
    assert found[0, 1, 0] == 0


@pytest.mark.parametrize("min_t", [1e-3, 0.3])
@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_elbo_of_an_exact_network_is_a_bound_wherever_it_is_cut(noise, min_t):
    it = made(noise, apply=exact(noise), min_t=min_t)
    process, predict = it.process, oracles.oracle(CHAIN, it.process)
    t, w = oracles.quadrature(24, 2.0, first=min_t)
    args = (CHAIN, process, losses.elbo, predict, CHAIN.sequences)
    above = oracles.expected(*args, t, 1 - t) @ w
    args = (CHAIN, process, losses.surprise, predict, CHAIN.sequences)
    below = oracles.expected(*args, np.full(1, min_t), [1 - min_t])[:, 0]
    bound = CHAIN.probs @ (above + below)
    # Two tokens hidden at once in the last step, order min_t^2.
    assert -2e-5 < bound - CHAIN.entropy < 2 * min_t**2 + 2e-5
    assert (bound - CHAIN.entropy > 0.02) == (min_t == 0.3)
    count = 40_000
    loss, metrics = run(it, inputs(data(count)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_token"], loss / math.log(2), 1e-5)
    # Weights 1 / t of at most three surprises, below ln 10 each: the second moment of
    # sum CE / t is at most 3 (ln 10)^2 3 ln(1 / min_t).
    spread = math.sqrt(9 * math.log(10) ** 2 * (1 + math.log(1 / min_t)) / count)
    assert abs(3 * loss - bound) < 3 * spread


def test_score_entropy_of_uniform_noise_is_cut_at_both_ends():
    cut = 0.3
    process = oracles.process_of(CHAIN, "uniform", prediction="score")

    def scores(params, z, cond, **how):
        alone = oracles.enumerated(CHAIN, process, z, cond["t"], skip_own=True)
        return process.log_marginal(jnp.log(alone), cond["t"])  # s of z becomes 1

    def shifted(params, z, cond, **how):
        raw = scores(params, z, cond)
        return raw - jnp.take_along_axis(raw, z[..., None], axis=-1)

    it = made("uniform", "score", shifted, loss="score_entropy", min_t=cut)
    t, w = oracles.quadrature(24, 2.0, first=cut)
    t, w = t - (t - cut) * cut / (1 - cut), w * (1 - 2 * cut) / (1 - cut)
    predict = oracles.oracle(CHAIN, process)
    args = (CHAIN, process, losses.elbo, predict, CHAIN.sequences)
    middle = CHAIN.probs @ oracles.expected(*args, t, 1 - t) @ w
    q = np.array([cut + (1 - cut) / 3, (1 - cut) / 3, (1 - cut) / 3])
    prior = 3 * (q * np.log(3 * q)).sum()
    np.testing.assert_allclose(3 * losses.prior(process, 1 - cut), prior, rtol=1e-5)

    def closing(process, answer, x, z, t, s):
        answer = answer._replace(raw=shifted({}, z, {"t": t}))
        return losses.score_surprise(process, answer, x, z, t)

    args = (predict, CHAIN.sequences, np.full(1, cut), [1 - cut])
    last, best = (
        CHAIN.probs @ oracles.expected(CHAIN, process, rate, *args)[:, 0]
        for rate in (closing, losses.surprise)
    )
    assert best < last < best + 0.5
    bound = middle + prior + last
    count = 40_000
    loss = 3 * run(it, inputs(data(count)))[0]
    # An example's nats are up to 3 ln 10 / cut, their root mean square below 4.
    assert abs(loss - bound) < 3 * 4 / math.sqrt(count)


@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_steps_of_an_exact_network_are_the_bound_of_the_chain(noise):
    it = made(noise, apply=exact(noise), loss="steps", num_timesteps=4)
    s, t = np.arange(4) / 4, (np.arange(4) + 1) / 4
    predict = oracles.oracle(CHAIN, it.process)
    args = (CHAIN, it.process, losses.steps, predict, CHAIN.sequences)
    bound = CHAIN.probs @ oracles.expected(*args, t, 1 - t, s).sum(-1)
    if noise == "masked":
        np.testing.assert_allclose(bound - CHAIN.entropy, 0.124961, atol=3e-6)
    count = 20_000
    loss, metrics = run(it, inputs(data(count)))
    # At most 4 * 3 ln 10, hardly ever.
    assert abs(3 * loss - bound) < 4 * 4 / math.sqrt(count)
    np.testing.assert_allclose(metrics["bits_per_token"], loss / math.log(2), 1e-5)
    # The hybrid has a thousandth of the cross-entropy besides.
    both = made(
        noise, apply=exact(noise), loss="hybrid", num_timesteps=4, hybrid_weight=0.5
    )
    more, found = run(both, inputs(data(count)))
    share = 1.0 if noise == "uniform" else 0.625  # masked tokens at 1/4 ... 1
    expected = 0.5 * share * metrics["cross_entropy"]
    np.testing.assert_allclose(more - loss, expected, rtol=0.02)
    np.testing.assert_allclose(found["bits_per_token"], metrics["bits_per_token"], 1e-6)


def test_cross_entropy_counts_masked_tokens_or_all():
    x = data(64)
    ways = [("masked", "one"), ("masked", "elbo"), ("uniform", "one")]
    found = {}
    for noise, weight in ways:
        it = made(noise, loss="cross_entropy", weight=weight)
        found[noise, weight] = run(it, inputs(x), weights())
    loss, metrics = found["uniform", "one"]
    np.testing.assert_allclose(metrics["cross_entropy"], loss, rtol=1e-5)
    assert "bits_per_token" not in metrics
    # Half of the tokens are masked: the sum over them is over all tokens.
    loss, metrics = found["masked", "one"]
    assert 0.3 < loss / metrics["cross_entropy"] < 0.7
    same = run(made(loss="elbo"), inputs(x), weights())
    np.testing.assert_allclose(found["masked", "elbo"][0], same[0], rtol=1e-6)
    np.testing.assert_allclose(same[1]["cross_entropy"], metrics["cross_entropy"])
    drawn = np.nan_to_num(same[1]["loss_by_logsnr"])
    assert drawn.shape == (10,) and (drawn > 0).sum() >= 4


@pytest.mark.parametrize(("loss", "noise", "prediction"), FITTING)
def test_values_and_gradients_are_finite_at_both_ends_of_time(loss, noise, prediction):
    t = (0.0, 1e-7, 1e-3, 0.5, 1 - 2.0**-24, 1.0)
    x = jnp.int32(CHAIN.sequences[3:9])
    # It scores targets, and each loss that needs more gets all logits.
    it = made(noise, prediction, either, True, loss=loss, times=At(t))

    def total(params, key):
        return it.train_loss({"denoiser": params}, inputs(x, key))[0]

    grad = jax.jit(jax.vmap(jax.value_and_grad(total), (None, 0)))
    value, slope = grad({"w": 5 * weights()["w"]}, jnp.arange(64))
    assert np.isfinite(value).all() and np.isfinite(slope["w"]).all()
    assert np.all(value >= 0) and np.any(slope["w"] != 0)
    # No weight is above about 1 / min_t, T for chains, of at most some 30 nats.
    assert value.max() < 1000 * 40


@pytest.mark.parametrize(
    ("loss", "noise"),
    [("elbo", "masked"), ("steps", "masked"), ("cross_entropy", "uniform")],
)
def test_a_network_that_scores_targets_is_asked_for_no_more(loss, noise):
    given = inputs(data(32))

    def both(apply, targets):
        it = made(noise, apply=apply, targets=targets, loss=loss)
        call = jax.value_and_grad(
            lambda params: it.train_loss({"denoiser": params}, given), has_aux=True
        )
        return jax.jit(call)(weights())

    whole, chunked = both(linear, False), both(either, True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), whole, chunked
    )


def test_an_answer_of_another_shape_is_refused():
    for apply, targets, match in (
        (lambda p, z, c, **how: linear(p, z, c)[..., 0], False, r"\(32, 3, 3\)"),
        (linear, True, r"\(32, 3\)"),
    ):
        it = made(apply=apply, targets=targets)
        call = lambda p, it=it: it.train_loss(p, inputs(data(32)))  # noqa: E731
        with pytest.raises(ValueError, match=f"config.networks.denoiser.*{match}"):
            jax.eval_shape(call, {"denoiser": weights()})


def test_times_of_a_batch_are_one_in_each_part():
    seen = []

    def apply(params, z, cond, **how):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), cond["t"])
        return jnp.zeros((*z.shape, K))

    run(made(apply=apply), inputs(data(16)))
    jax.effects_barrier()
    parts = np.sort(np.floor(seen[0] * 16))
    np.testing.assert_array_equal(parts, np.arange(16))


def test_labels_are_dropped_as_often_as_told():
    seen = []

    def apply(params, z, cond, **how):
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), cond["label"])
        return jnp.zeros((*z.shape, K))

    spec = SPEC._replace(num_classes=5)
    label = jnp.arange(400) % 5
    it = made(apply=apply, spec=spec, label_dropout=0.25)
    run(it, inputs(data(400), label=label))
    jax.effects_barrier()
    dropped = seen[0] == 5
    assert abs(dropped.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_array_equal(seen[0][~dropped], label[~dropped])


def test_pixels_are_tokens_of_levels():
    spec = DataSpec(shape=(2, 2, 1))
    process = dataclasses.replace(
        oracles.process_of(CHAIN, "masked"), spec=spec, levels=16
    )
    network = Network(
        lambda key: {}, lambda p, z, c, **how: jnp.zeros((*z.shape, 16)), ()
    )
    it = Discrete(
        process=process, networks={"denoiser": network}, spec=spec, times=Uniform()
    )
    x = jax.random.uniform(jax.random.key(0), (500, 2, 2, 1), minval=-1)
    _, metrics = run(it, inputs(x))
    np.testing.assert_allclose(metrics["cross_entropy"], math.log(16), rtol=1e-5)
    # A network that knows nothing needs 4 bits; a binomial count over t.
    assert abs(metrics["bits_per_token"] - 4) < 0.8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": "vb"}, "loss: unknown 'vb'; known: elbo, score_entropy, steps"),
        ({"weight": "two"}, "weight: unknown 'two'; known: one, elbo"),
        ({"loss": "score_entropy"}, "process.prediction 'score', got 'denoiser'"),
        (
            {"noise": "uniform", "prediction": "score"},
            "loss: 'elbo' cannot train scores under uniform noise",
        ),
        ({"weight": "elbo"}, "weight: 'elbo' is one of 'cross_entropy'"),
        (
            {"noise": "uniform", "loss": "cross_entropy", "weight": "elbo"},
            "weight: no weight makes cross-entropy under uniform noise an ELBO",
        ),
        ({"times": LogitNormal()}, "times.as_uniform: must be True"),
        ({"times": ChainTimes(num_timesteps=10)}, "times.num_timesteps: is 10"),
        (
            {"times": ChainTimes(num_timesteps=10), "loss": "steps"},
            "'steps' of 1000 takes 'uniform'",
        ),
        ({"times": LogitNormal(), **WEIGHTED}, "times.as_uniform: must be True"),
        ({**UNIFORM_SCORES, "min_t": 0.5}, "min_t: must be below 0.5, for 'score_en"),
        ({"min_t": 0.0}, r"min_t: must be in \(0, 1\), got 0"),
        ({"label_dropout": 1.5}, "label_dropout: must be in"),
        ({"num_timesteps": 0}, "num_timesteps: must be at least 1"),
        ({"hybrid_weight": -1.0}, "hybrid_weight: must be at least 0"),
        ({"networks": {"denoiser": CAUSAL}}, "name: .* needs a network that sees all"),
    ],
)
def test_what_does_not_fit_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        made(**changes)


def perceptron(params, z, cond, *, train=False, key=None):
    seen = jax.nn.one_hot(z, K + 1).reshape(len(z), -1)
    seen = jnp.concatenate([seen, cond["t"][:, None], cond["logsnr"][:, None] / 8], -1)
    h = jax.nn.gelu(seen @ params["in"] + params["bias"])
    return (h @ params["out"]).reshape(*z.shape, K)


@pytest.mark.parametrize(
    ("noise", "prediction"), [("masked", "denoiser"), ("uniform", "leave_one_out")]
)
def test_a_small_network_reaches_the_entropy(noise, prediction):
    it = made(noise, prediction, apply=perceptron)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": 0.3 * jax.random.normal(keys[0], (3 * (K + 1) + 2, 64)),
        "bias": jnp.zeros(64),
        "out": 0.1 * jax.random.normal(keys[1], (64, 3 * K)),
    }
    steps, size = 800, 256
    x = data(steps * size).reshape(steps, size, 3)
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def step(carry, now):
        params, state = carry
        x, index = now
        grads = jax.grad(lambda p: it.train_loss({"denoiser": p}, inputs(x, index))[0])(
            params
        )
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry, x: jax.lax.scan(step, carry, (x, jnp.arange(steps))))
    params = train((params, adam.init(params)), x)[0][0]
    power = 1.0 if noise == "masked" else 3.0
    nats = CHAIN.probs @ oracles.bound(
        CHAIN,
        it.process,
        "linear",
        CHAIN.sequences,
        lambda z, t: it.predict({"denoiser": params}, z, t, {}),
        nodes=(16, power),
    )
    assert CHAIN.entropy < nats < CHAIN.entropy + 0.02
