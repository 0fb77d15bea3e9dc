"""Next-token prediction: probabilities that sum to one, and known losses."""

import functools

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusionlab.evals.denoising_loss import DenoisingLoss
from diffusionlab.models import network
from diffusionlab.models.causal_transformer import CausalTransformer
from diffusionlab.objectives.language_model import LanguageModel
from diffusionlab.processes.categorical import Categorical
from diffusionlab.schedules.alpha import Linear
from diffusionlab.types import DataSpec, Inputs, Network

CHAIN = enumerated.chain()
SPEC = DataSpec((3,), num_tokens=3)


def objective(net, spec=SPEC, levels=0):
    process = Categorical(spec=spec, schedule=Linear(), levels=levels)
    return LanguageModel(process=process, networks={"language_model": net}, spec=spec)


def of_table(joint):
    """Logits of the chain rule, by enumeration: P(x_i | x before i)."""
    tables = []
    for i in range(joint.length):
        head = joint.table.sum(axis=tuple(range(i + 1, joint.length)))
        tables.append(np.log(head / head.sum(axis=-1, keepdims=True)))

    def logits(params, z, cond, *, train=False, key=None):
        rows = [
            jnp.asarray(table, jnp.float32)[tuple(z[:, j] for j in range(i))]
            for i, table in enumerate(tables)
        ]
        # Not normalised: the objective has to do that.
        rows = [jnp.broadcast_to(row, (len(z), row.shape[-1])) for row in rows]
        return jnp.stack(rows, axis=1) + 2.5

    return Network(lambda key: {}, logits, (), is_causal=True)


def transformer():
    sizes = dict(width=16, num_layers=1, num_heads=2, mlp_ratio=2)
    process = Categorical(spec=SPEC, schedule=Linear())
    module = CausalTransformer(spec=SPEC, dtype="float32", process=process, **sizes)
    return network.as_network(module, SPEC)


def batch(x):
    return Inputs({"x": jnp.asarray(x)}, jax.random.key(0), jnp.int32(0), {}, {})


def test_it_has_one_role_one_phase_and_nothing_to_sample():
    it = objective(transformer())
    assert it.roles["language_model"].network == "language_model"
    assert it.phases[it.phase(7)].trains == ("language_model",) == it.samples_from
    assert it.processes == ("categorical",)
    assert not hasattr(it, "predict")


def test_the_chain_rule_gives_the_probability_of_every_sequence():
    """Numbers of the fixture: -log P(000) = 1.139434, and its entropy."""
    it = objective(of_table(CHAIN))
    params = {"language_model": {}}
    x = jnp.asarray(CHAIN.sequences, jnp.int32)
    found = np.asarray(it.token_log_probs(params, x))
    assert found.shape == (27, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), np.log(CHAIN.probs), atol=2e-6)
    known = {(0, 0, 0): 1.139434, (2, 1, 0): 4.422849, (1, 2, 2): 3.324236}
    for sequence, nats in known.items():
        row = CHAIN.sequences.tolist().index(list(sequence))
        assert -found[row].sum() == pytest.approx(nats, abs=2e-6)
    assert -(CHAIN.probs @ found.sum(1)) == pytest.approx(2.602681, abs=2e-6)


def test_the_loss_is_in_nats_per_token():
    it = objective(of_table(CHAIN))
    x = [[0, 0, 0], [2, 1, 0], [1, 2, 2], [0, 0, 0]]
    loss, metrics = it.loss({"language_model": {}}, batch(x))
    nats = np.array([1.139434, 4.422849, 3.324236, 1.139434]) / 3
    assert float(loss) == pytest.approx(nats.mean(), abs=1e-6)
    total, count = metrics["loss"]
    assert (float(total), float(count)) == (pytest.approx(nats.sum(), abs=4e-6), 4)
    total, count = metrics["bits_per_token"]
    assert float(total / count) == pytest.approx(nats.mean() / np.log(2), abs=1e-6)
    assert "perplexity" not in metrics


def test_perplexity_is_that_of_the_mean_loss():
    it = objective(of_table(CHAIN))
    rows = CHAIN.sequences[[0, 21, 17, 5]].astype(np.int32)

    class Context:
        test = [{"x": row} for row in rows]

        @staticmethod
        def loss(batch, index):
            x = jnp.asarray(batch["x"])
            return it.loss({"language_model": {}}, Inputs({"x": x}, 0, 0, {}, {}))[1]

    numbers = DenoisingLoss(num_batches=2, batch_size=2)(Context).numbers
    mean = -np.mean([CHAIN.log_prob(row) for row in rows]) / 3
    assert numbers["perplexity"] == pytest.approx(np.exp(mean), rel=1e-6)
    halves = [
        np.exp(-np.mean([CHAIN.log_prob(r) for r in rows[i : i + 2]]) / 3)
        for i in (0, 2)
    ]
    assert abs(np.mean(halves) - np.exp(mean)) > 0.05


@functools.cache
def trained():
    """A transformer trained on the chain with its exact probabilities as weights."""
    net = transformer()
    it = objective(net)
    x = jnp.asarray(CHAIN.sequences, jnp.int32)
    probs = jnp.asarray(CHAIN.probs, jnp.float32)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 300), b2=0.99)

    def loss(params):
        return -probs @ it.token_log_probs({"language_model": params}, x).sum(1)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        carry, values = jax.lax.scan(
            step, (params, optimizer.init(params)), None, length=300
        )
        return carry[0], values

    params, values = train(jax.jit(net.init)(jax.random.key(0)))
    return it, params, np.asarray(values)


def test_training_reaches_the_entropy_and_not_below():
    _, _, values = trained()
    assert values[0] == pytest.approx(3 * np.log(3), abs=1e-5)
    # The difference is a divergence: never negative, but for rounding.
    assert -2e-6 < values[-1] - CHAIN.entropy < 0.002


def test_probabilities_of_all_sequences_sum_to_one():
    """Whatever the parameters; a network that saw its token would exceed it."""
    it, params, _ = trained()
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda p: p + np.float32(rng.normal(size=p.shape) / 3), params)
    x = jnp.asarray(CHAIN.sequences, jnp.int32)
    run = jax.jit(it.token_log_probs)
    for these in (params, moved):
        log_probs = np.float64(run({"language_model": these}, x)).sum(1)
        assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-5)


def test_tokens_of_pixels_are_scored_by_their_levels():
    spec = DataSpec((1, 3, 1))
    joint = CHAIN

    def apply(params, z, cond, *, train=False, key=None):
        flat = of_table(joint).apply(params, z.reshape(-1, 3), cond)
        return flat.reshape(*z.shape, 3)

    net = Network(lambda key: {}, apply, (), is_causal=True)
    it = objective(net, spec, levels=3)
    x = np.float32([[1, 0, -1], [0, 1, 1]]).reshape(2, 1, 3, 1)
    loss, _ = it.loss({"language_model": {}}, batch(x))
    assert float(loss) == pytest.approx((4.422849 + 3.324236) / 6, abs=1e-6)


def test_dropout_is_on_in_training_alone():
    said = []

    def apply(params, z, cond, *, train=False, key=None):
        said.append((train, key))
        return jnp.zeros((*z.shape, 3))

    it = objective(Network(lambda key: {}, apply, (), is_causal=True))
    given = batch(CHAIN.sequences)
    it.loss({"language_model": {}}, given)
    it.token_log_probs({"language_model": {}}, given.batch["x"])
    assert said == [(True, given.key), (False, None)]


def test_networks_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="needs a causal network"):
        objective(of_table(CHAIN)._replace(is_causal=False))

    def of_data(params, z, cond, *, train=False, key=None):
        return z.astype(jnp.float32)

    it = objective(Network(lambda key: {}, of_data, (), is_causal=True))
    with pytest.raises(ValueError, match=r"answers \(2, 3\), and must answer \(2, 3"):
        it.loss({"language_model": {}}, batch(np.zeros((2, 3), np.int32)))
