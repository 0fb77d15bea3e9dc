"""The evaluator of the bound, with exact denoisers in the place of a network."""

import types as python_types

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.distillation import input_noise
from diffusionlab.evals import elbo
from diffusionlab.evals.elbo import Elbo
from diffusionlab.processes.categorical import Categorical
from diffusionlab.schedules import alpha

CHAIN = enumerated.chain()
ENTROPY = 2.602681
SPEC = types.DataSpec((3,), num_tokens=3)


class Source:
    """As many examples as `number`, each sequence as often as it is probable."""

    def __init__(self, joint, number, spec=None, seed=0):
        self.spec = spec or types.DataSpec((joint.length,), num_tokens=joint.num_tokens)
        # Systematic draws: counts are within one of their expectation.
        at = (np.arange(number) + 0.5) / number
        rows = np.searchsorted(np.cumsum(joint.probs), at)
        self.tokens = joint.sequences[np.minimum(rows, len(joint.probs) - 1)]
        self.x = self.tokens.astype(np.int32)
        np.random.default_rng(seed).shuffle(self.x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index]}


def exact(joint, process):
    """Returns `predict` with the denoiser by enumeration of clean sequences."""
    sequences = jnp.asarray(joint.sequences)
    log_p = jnp.log(jnp.asarray(joint.probs, jnp.float32))
    k = joint.num_tokens

    def predict(z_t, t, cond):
        assert "label" not in cond
        # log q(z | x) of each position's symbol for each token, [B, L, K].
        t = jnp.broadcast_to(t, len(z_t))
        share = process.one_minus_alpha(t, 2, classes=True)
        own = process.alpha(t, 2, classes=True) * jax.nn.one_hot(z_t, k)
        own += share * (z_t == k)[..., None] if process.is_masked else share / k
        own = jnp.log(jnp.maximum(own, 1e-30))
        chosen = jnp.take_along_axis(own[:, None], sequences[None, ..., None], -1)
        joint_log = log_p + chosen[..., 0].sum(-1)  # [B, N]
        tokens = jax.nn.one_hot(sequences, k)
        weights = jax.nn.softmax(joint_log)
        p = jnp.einsum("bn,nlk->blk", weights, tokens)
        return types.CategoricalPrediction(jnp.log(jnp.maximum(p, 1e-30)))

    return predict


def context(joint, process, number, source=None):
    predict = exact(joint, process)

    @jax.jit
    def call(x, label, index):
        return function(predict, x, label, index)

    def compute(given, *arrays, guided=False):
        nonlocal function
        assert not guided and function in (None, given)
        function = given
        return jax.device_get(call(*arrays))

    function = None
    source = source or Source(joint, number)
    return python_types.SimpleNamespace(
        spec=source.spec, test=source, process=process, compute=compute
    )


@pytest.mark.parametrize("end, block_length", [(0.0, 0), (0.05, 0), (0.0, 1)])
@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_the_bound_of_the_exact_denoiser_is_the_entropy(noise, end, block_length):
    process = Categorical(
        spec=SPEC,
        schedule=alpha.Linear(end=end),
        noise=noise,
        block_length=block_length,
    )
    number = 3000
    given = context(CHAIN, process, number)
    num_times = 16 * 9 if block_length else 16
    run = Elbo(num_examples=number, batch_size=number // 2, num_times=num_times)
    result = run(given)
    low, high = result.intervals["nats_per_token"]
    error = (high - low) / 2 / 1.959964
    mean = result.numbers["nats_per_token"]
    # The bound is tight at each sequence; what it varies by besides is the noise.
    exact_nats = -np.array([CHAIN.log_prob(x) for x in given.test.x]) / 3
    of_data = exact_nats.std() / np.sqrt(number)
    assert error > of_data
    noise_error = np.sqrt(error**2 - of_data**2)
    assert abs(mean - exact_nats.mean()) < 3.5 * noise_error < 0.04
    # As many sequences as are probable: a rounded count each.
    assert exact_nats.mean() == pytest.approx(ENTROPY / 3, abs=2e-3)
    assert low < ENTROPY / 3 < high
    assert result.numbers["bits_per_token"] == pytest.approx(mean / np.log(2))
    assert result.numbers["perplexity"] == pytest.approx(np.exp(mean))
    assert result.intervals["perplexity"][0] == pytest.approx(np.exp(low))
    for name in ("prior", "reconstruction"):
        assert (name in result.numbers) == (end > 0)
    if end and noise == "uniform":
        p = np.array([end + (1 - end) / 3, (1 - end) / 3, (1 - end) / 3])
        divergence = np.sum(p * np.log(3 * p))
        assert result.numbers["prior"] == pytest.approx(divergence, rel=1e-3)
    elif end:
        # Nothing is known: -log of each token's own marginal.
        marginals = [CHAIN.table.sum(axis) for axis in ((1, 2), (0, 2), (0, 1))]
        nats = [-np.log(p[x]) for p, x in zip(marginals, given.test.x.T, strict=True)]
        assert result.numbers["prior"] == pytest.approx(end * np.mean(nats), rel=1e-5)


def test_data_with_levels_have_bits_per_dimension():
    spec = types.DataSpec((3,))
    source = Source(CHAIN, 300, spec)
    source.x = source.x.astype(np.float32) - 1  # -1, 0, 1
    process = Categorical(spec=spec, schedule=alpha.Linear(), levels=3)
    result = Elbo(num_examples=300, batch_size=200, num_times=16)(
        context(CHAIN, process, 300, source)
    )
    assert "bits_per_token" not in result.numbers
    low, high = result.intervals["bits_per_dim"]
    exact_bits = ENTROPY / 3 / np.log(2)
    assert abs(result.numbers["bits_per_dim"] - exact_bits) < (high - low)
    assert (
        "300 held-out examples of 3 tokens out of 3, 16 times" in result.notes["data"]
    )


def test_the_same_noise_at_every_evaluation_and_padding_counts_nothing():
    process = Categorical(spec=SPEC, schedule=alpha.Linear())
    given = context(CHAIN, process, 40)
    run = Elbo(num_examples=40, batch_size=32, num_times=4)
    first = run(given)
    assert first == run(given)
    found = []

    def compute(function, x, label, index):
        found.append(index)
        return np.stack([np.float32(index), np.zeros(len(x)), np.zeros(len(x))])

    given.compute = compute
    numbers = run(given).numbers
    assert [len(index) for index in found] == [32, 32]
    assert numbers["nats_per_token"] == pytest.approx(np.arange(40).mean() / 3)


def test_a_student_draws_its_own_noise_anew_at_each_time():
    process = Categorical(spec=SPEC, schedule=alpha.Linear())
    seen = []

    def predict(z_t, t, cond):
        keys = input_noise.keys_at(cond["key"], t)
        seen.append(jax.vmap(jax.random.uniform)(keys))
        return types.CategoricalPrediction(jnp.full((*z_t.shape, 3), -jnp.log(3.0)))

    with jax.disable_jit():
        x = jnp.zeros((5, 3), jnp.int32)
        elbo.bound(process, 4)(predict, x, None, jnp.arange(5))
    assert len(np.unique(np.stack(seen))) == 5 * 4


@pytest.mark.parametrize("field", ["num_examples", "batch_size", "num_times"])
def test_counts_are_at_least_one(field):
    with pytest.raises(ValueError, match=f"{field}: must be at least 1, got 0"):
        Elbo(**{field: 0})
