"""Samples with given tokens: exact by enumeration, and from the command line."""

import itertools
import json
import types

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pushed
import pytest

from diffusionlab import infilling
from diffusionlab.samplers import base
from diffusionlab.samplers.fixed import Fixed
from diffusionlab.samplers.token_orders import TokenConfidence, TokenRemasking
from diffusionlab.samplers.tokens import TokenAncestral, TokenTweedie

CHAIN = enumerated.chain()
MASKED, UNIFORM = (pushed.process(CHAIN, noise) for noise in ("masked", "uniform"))


def conditional(joint, given):
    """Returns the joint, zero where it differs from {position: token}, `[K^L]`."""
    keep = np.all([joint.sequences[:, i] == k for i, k in given.items()], axis=0)
    p = np.where(keep, joint.probs, 0)
    return p / p.sum()


def fixed(sampler, given, **options):
    x, known = np.zeros(3, np.int32), np.zeros(3, bool)
    for i, token in given.items():
        x[i], known[i] = token, True
    return Fixed(sampler=sampler, tokens=x, known=known, **options)


def prior(sampler, given):
    z = np.full(sampler.z.shape[1], sampler.process.mask)
    for i, token in given.items():
        z[i] = token
    return np.all(sampler.z == z, axis=1).astype(float)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({0: 0}, (0.208, 0.052, 0.013)),
        ({0: 2}, (0.231, 0.05775, 0.0144375)),
        ({1: 1}, (0, 0, 0)),  # the others are independent then
        ({0: 2, 2: 0}, (0, 0, 0)),  # there is but one other
    ],
)
def test_masked_infilling_tends_to_the_conditional(given, wanted):
    sampler = pushed.Pushed(CHAIN, MASKED)
    start, right = prior(sampler, given), conditional(CHAIN, given)
    found = [pushed.distance(sampler.output(n, prior=start), right) for n in (1, 4, 16)]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def replaced(sampler, given, t):
    """The transition that puts fresh noise of the given tokens there, `[S, S]`."""
    z, k = sampler.z, CHAIN.num_tokens
    found = np.ones((len(z), len(z)))
    for i in range(3):
        same = z[:, i][:, None] == z[:, i][None, :]
        if i in given:
            same = ((1 - t) * (z[:, i] == given[i]) + t / k)[None, :]
        found *= same
    return found


def noisier(sampler, t, s):
    """q(z_t | z_s) of the linear schedule, `[S, S]`."""
    keep = (1 - t) / (1 - s)
    one = keep * np.eye(3) + (1 - keep) / 3
    return pushed.matrix(one[sampler.z], sampler.z)


def uniform_output(sampler, given, num_steps, repeats):
    """What `Fixed` samples under uniform noise, exactly, `[K^L]`."""
    p = sampler.prior()
    for t, s in itertools.pairwise(np.linspace(1, 0, num_steps + 1)):
        put, move = replaced(sampler, given, t), sampler.steps(*np.float32((t, s)))
        for repeat in range(repeats):
            p = p @ (noisier(sampler, t, s) if repeat else np.eye(len(p))) @ put @ move
    return p


def unknown(p, given):
    """The marginal of what is not given, as a distribution over the given x."""
    table = p.reshape((3,) * 3).sum(axis=tuple(given))
    x = CHAIN.sequences
    rest = [i for i in range(3) if i not in given]
    keep = np.all([x[:, i] == k for i, k in given.items()], axis=0)
    return np.where(keep, table[tuple(x[:, i] for i in rest)], 0)


def test_uniform_infilling_stalls_and_repeats_mend_it():
    sampler, given = pushed.Pushed(CHAIN, UNIFORM), {0: 0}
    right = conditional(CHAIN, given)
    found = {
        (n, repeats): pushed.distance(
            unknown(uniform_output(sampler, given, n, repeats), given), right
        )
        for n, repeats in ((16, 1), (64, 1), (16, 4), (16, 16))
    }
    wanted = {(16, 1): 0.15999, (64, 1): 0.15499, (16, 4): 0.07401, (16, 16): 0.03259}
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "process, sampler, repeats",
    [
        (MASKED, TokenAncestral(num_steps=2, cached=True), 1),
        (UNIFORM, TokenAncestral(num_steps=2), 3),
        (UNIFORM, TokenTweedie(num_steps=2), 1),
    ],
)
def test_samples_come_as_the_steps_make_them(process, sampler, repeats):
    given = {0: 2}
    exact = pushed.Pushed(CHAIN, process)
    if process.is_masked:
        wanted = exact.output(2, prior=prior(exact, given))
    else:
        wanted = unknown(uniform_output(exact, given, 2, repeats), given)
    keys = jax.random.split(jax.random.key(0), 20_000)
    predict = pushed.oracle(CHAIN, process)
    around = fixed(sampler, given, repeats=repeats)
    around.check(process, process.spec)
    x = jax.jit(lambda k: base.sample(around, process, predict, k, (3,)))(keys)
    pushed.check_counts(x, wanted, 3)
    assert around.num_evaluations == 2 * repeats


def test_repeats_go_back_to_the_time_of_the_step():
    seen = []

    class Spy(TokenAncestral):
        def step(self, process, predict, state, t, s, keys):
            seen.append((np.asarray(state.z), np.asarray(jax.random.key_data(keys))))
            return base.State(jnp.zeros_like(state.z), state.x)

    around = fixed(Spy(num_steps=1), {0: 1}, repeats=3)
    z, n = jnp.full((4000, 3), 2), 8000
    keys = jax.random.split(jax.random.key(0), len(z))
    with jax.disable_jit():
        state, t, s = around.init(z, 1.0), jnp.float32(0.6), jnp.float32(0.2)
        around.step(UNIFORM, None, state, t, s, keys)
    (first, *again), used = zip(*seen, strict=True)
    np.testing.assert_array_equal(first[:, 1:], z[:, 1:])  # it is at t already
    # Of q(z_t | z_s): the chance to stay is 1/2, and a third of what does not.
    for found in again:
        stayed = np.mean(found[:, 1:] == 0)
        assert abs(stayed - 2 / 3) < 5 * np.sqrt(2 / 9 / n)
    both = np.mean((again[0] == 0)[:, 1:] & (again[1] == 0)[:, 1:])
    assert abs(both - 4 / 9) < 5 * np.sqrt(20 / 81 / n)
    # What is given is q(z_t | x) each time, fresh.
    given = [found[:, 0] == 1 for found in (first, *again)]
    chance = 0.4 + 0.2
    assert np.all(np.abs(np.mean(given, 1) - chance) < 5 * np.sqrt(0.24 / 4000))
    assert abs(np.mean(given[0] & given[1]) - 0.36) < 5 * np.sqrt(0.2304 / 4000)
    assert len(np.unique(np.concatenate(used), axis=0)) == 3 * len(z)


@pytest.mark.parametrize(
    "sampler",
    [
        TokenTweedie(num_steps=3),
        TokenRemasking(num_steps=3, cap=1.0),
        TokenConfidence(num_steps=3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_sampler_leaves_what_each_example_has_been_given(sampler):
    keys = jax.random.split(jax.random.key(1), 3)
    x = np.array([[0, 1, 2], [2, 1, 0], [2, 2, 2]], np.int32)
    known = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    around = Fixed(sampler=sampler, tokens=x, known=known)
    around.check(MASKED, MASKED.spec)
    predict = pushed.oracle(CHAIN, MASKED)
    sampled = jax.jit(lambda k: base.sample(around, MASKED, predict, k, (3,)))
    found = np.asarray(sampled(keys))
    np.testing.assert_array_equal(found[known], x[known])
    assert found.min() >= 0 and found.max() < 3


def test_the_surest_first_counts_only_what_is_unknown():
    around = fixed(TokenConfidence(num_steps=2), {0: 1})
    z = jnp.full((1, 3), MASKED.mask)
    keys = jax.random.split(jax.random.key(0), 1)
    t, s = jnp.float32(1), jnp.float32(0.5)
    predict = pushed.oracle(CHAIN, MASKED)
    step = jax.jit(
        lambda z: around.step(MASKED, predict, around.init(z, t), t, s, keys)
    )
    state = step(z)
    assert state.num_masks[0] == 2 and np.sum(state.z == MASKED.mask) == 1


def test_what_does_not_fit_is_refused():
    sampler = TokenAncestral(num_steps=2)
    with pytest.raises(ValueError, match="repeats: is for uniform noise, got 2"):
        fixed(sampler, {0: 1}, repeats=2).check(MASKED, MASKED.spec)
    with pytest.raises(ValueError, match="repeats: must be at least 1, got 0"):
        fixed(sampler, {0: 1}, repeats=0)
    with pytest.raises(ValueError, match="tokens: expected 0 to 2, got 1 to 3"):
        fixed(sampler, {0: 1, 2: 3}).check(MASKED, MASKED.spec)
    short = Fixed(sampler=sampler, tokens=np.zeros(2, int), known=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"tokens: have the shape \(2,\), and one"):
        short.check(MASKED, MASKED.spec)
    with pytest.raises(ValueError, match=r"known: has the shape \(3,\), and the tok"):
        Fixed(sampler=sampler, tokens=np.zeros(2, int), known=np.ones(3, bool))
    with pytest.raises(ValueError, match="name: 'token_confidence' is for masked"):
        fixed(TokenConfidence(num_steps=2), {0: 1}).check(UNIFORM, UNIFORM.spec)


class Letters:
    """Text of letters from a on."""

    def encode(self, text):
        if not text.islower():
            raise ValueError("text: not a letter.")
        return np.array([ord(letter) - ord("a") for letter in text], np.int32)


def test_text_becomes_tokens_that_are_known(tmp_path):
    file = tmp_path / "gaps.txt"
    file.write_text("ab__c_\n")
    given = infilling.read(None, file, "_")
    x, known = infilling.tokens_of(given, Letters(), 8)
    np.testing.assert_array_equal(known, [1, 1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(x[known], [0, 1, 2])
    x, known = infilling.tokens_of(infilling.read("cab", None), Letters(), 4)
    np.testing.assert_array_equal(known, [1, 1, 1, 0])
    np.testing.assert_array_equal(x[:3], [2, 0, 1])
    assert infilling.read(None, None) is None
    other = infilling.read(None, file, "c")  # the underscores are text then
    assert other.digest != given.digest
    with pytest.raises(ValueError, match="--infill: not a letter"):
        infilling.tokens_of(other, Letters(), 8)
    with pytest.raises(ValueError, match="--prompt: has 3 tokens, and samples 2"):
        infilling.tokens_of(infilling.read("abc", None), Letters(), 2)


def test_flags_that_make_no_sense_are_refused(tmp_path):
    file = tmp_path / "gaps.txt"
    with pytest.raises(FileNotFoundError, match="--infill: there is no file '.*gaps"):
        infilling.read(None, file)
    for content, said in ((b"\n", "is empty"), (b"\xff", "is no UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"--infill: '.*' {said}"):
            infilling.read(None, file)
    with pytest.raises(ValueError, match="--prompt: goes with --mode=sample, got --m"):
        infilling.read("a", None, mode="eval")
    with pytest.raises(ValueError, match="--prompt: goes without --infill"):
        infilling.read("a", file)
    with pytest.raises(ValueError, match="--prompt: is empty"):
        infilling.read("", None)
    with pytest.raises(ValueError, match="--blank: expected one character, got '__'"):
        infilling.read(None, file, "__")
    config = {"data": {"source": {"name": "digits"}}}
    pictures = types.SimpleNamespace(
        train_source=object(), spec=MASKED.spec, config=config
    )
    given = infilling.read("a", None)
    with pytest.raises(ValueError, match="--prompt: is for text, and the data are 'd"):
        infilling.sampler(pictures, given)


def test_prompt_and_infill_of_the_program(programs, tmp_path):
    """A run of a tiny network, which no training is needed for."""
    run, file = tmp_path / "run", tmp_path / "gaps.txt"
    file.write_text("de_ th__")
    sample = [f"--workdir={run}", "--mode=sample", "--num_samples=4", "--batch_size=4"]
    programs(
        [
            [
                "--config=configs/text/masked.py:smoke",
                f"--workdir={run}",
                "--config.train.num_steps=1",
                "--config.evals={}",
                "--config.logging.samples_every=0",
            ],
            [*sample, "--prompt=The "],
            [*sample, f"--infill={file}"],
        ]
    )
    found = {}
    for job in (run / "samples").glob("*/job.json"):
        given = json.loads(job.read_text())["given"]
        found[given["text"]] = (job.parent / "samples.txt").read_text()
        assert len(np.load(job.parent / "samples.npz")["x"]) == 4
    assert set(found) == {"The ", "de_ th__"}
    assert found["The "].count("The ") >= 4
    assert found["de_ th__"].count(" th") >= 4 and found["de_ th__"].count("de") >= 4
