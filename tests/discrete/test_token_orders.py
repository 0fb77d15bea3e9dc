"""Tokens that are masked again, the surest tokens first, and guidance of tokens."""

from unittest import mock

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pushed
import pytest

from diffusionlab.guidance.classifier_free import ClassifierFree
from diffusionlab.samplers import base, tokens
from diffusionlab.samplers.token_orders import TokenConfidence, TokenRemasking
from diffusionlab.schedules import alpha
from diffusionlab.types import CategoricalPrediction, DataSpec

CHAIN = enumerated.chain()
MASKED = pushed.process(CHAIN)
T, S = np.float32(0.7), np.float32(0.4)


@pytest.mark.parametrize("cap, rescale", [(0.1, 1.0), (1.0, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("schedule", [alpha.Linear(), alpha.Cosine(end=0.05)])
def test_masking_again_keeps_the_marginal(cap, rescale, schedule):
    process = pushed.process(CHAIN, schedule=schedule)
    sampler = TokenRemasking(num_steps=1, cap=cap, rescale=rescale)
    x = jnp.log(jnp.maximum(jax.nn.one_hot(jnp.full((2, 1), 1), 3), 1e-30))
    z = jnp.array([[1], [process.mask]])  # what z_t can be, given x = 1
    for t, s in ((0.9, 0.8), (0.5, 0.05), (1.0, 0.6)):
        to = np.exp(sampler.law(process, x, z, jnp.float32(t), jnp.float32(s)))[:, 0]
        a_t, a_s = (float(schedule.alpha(q)) for q in (t, s))
        found = a_t * to[0] + (1 - a_t) * to[1]
        np.testing.assert_allclose(found, [0, a_s, 0, 1 - a_s], atol=1e-6)
        # It does mask again: all it may of what the cap leaves it.
        sigma = min(cap, rescale * min(1.0, (1 - a_s) / max(a_t, 1e-30)))
        assert to[0, -1] == pytest.approx(sigma, abs=1e-6)


def test_masking_nothing_again_is_the_ancestral_law():
    z = pushed.states(CHAIN, MASKED)
    log_x = pushed.oracle(CHAIN, MASKED)(z, T).logits
    for s in (S, np.float32(0)):
        found = TokenRemasking(num_steps=1, cap=0.0).law(MASKED, log_x, z, T, s)
        wanted = tokens.law(MASKED, log_x, z, T, s)
        np.testing.assert_allclose(np.exp(found), np.exp(wanted), atol=1e-6)


def test_masking_again_costs_an_exact_network_steps():
    found = {
        cap: pushed.Pushed(CHAIN, MASKED, TokenRemasking(num_steps=1, cap=cap).law)
        for cap in (0.02, 1.0)
    }
    small = [found[0.02].error(n) for n in (1, 4, 16, 64)]
    np.testing.assert_allclose(
        small, (0.429471, 0.115151, 0.029063, 0.008276), atol=2e-6
    )
    large = [found[1.0].error(n) for n in (4, 16, 64)]
    np.testing.assert_allclose(large, (0.151182, 0.061474, 0.026097), atol=2e-6)


def test_an_order_of_chance_samples_the_joint():
    """One token per step in random order is the chain rule: no error is left."""
    sampler = TokenConfidence(num_steps=3, choice_temperature=1e6)
    keys = jax.random.split(jax.random.key(0), 20_000)
    predict = pushed.oracle(CHAIN, MASKED)
    x = jax.jit(lambda k: base.sample(sampler, MASKED, predict, k, (3,)))(keys)
    pushed.check_counts(x, CHAIN.probs, 3)


def ladder(num, num_tokens=4):
    """A network that is surer of each position than of the one before it."""
    sure = jnp.linspace(0.3, 0.95, num)[:, None]
    first = jnp.arange(num_tokens) == 0
    logits = jnp.log(jnp.where(first, sure, (1 - sure) / (num_tokens - 1)))
    return lambda z_t, t: CategoricalPrediction(
        jnp.broadcast_to(logits, (*z_t.shape, num_tokens))
    )


def test_the_surest_come_first_and_as_many_as_the_schedule_says():
    joint = enumerated.product(*[[0.25] * 4] * 10)
    process = pushed.process(joint, schedule=alpha.Cosine())
    sampler = TokenConfidence(num_steps=4, choice_temperature=0.0, top_p=0.29)
    keys = jax.random.split(jax.random.key(0), 3)
    state = sampler.init(jnp.full((3, 10), 4), jnp.float32(1))
    step = jax.jit(
        lambda state, t, s: sampler.step(process, ladder(10), state, t, s, keys)
    )
    for n in range(4):
        t, s = (np.float32(1 - q / 4) for q in (n, n + 1))
        state = step(state, t, s)
        left = round(10 * np.cos(np.pi / 2 * (n + 1) / 4)) if n < 3 else 0
        wanted = np.arange(10) < left
        np.testing.assert_array_equal(state.z == 4, np.tile(wanted, (3, 1)))
    np.testing.assert_array_equal(sampler.final(state), np.zeros((3, 10)))


@pytest.mark.parametrize("s, first", [(0.5, 0), (0.26, 1)])
def test_noise_on_the_order_fades_with_time(s, first):
    """It is sure of the second by 1.15 more, and of the first the noise is 4 s more."""
    joint = enumerated.product(*[[0.25] * 4] * 2)
    process = pushed.process(joint)
    sampler = TokenConfidence(num_steps=2, top_p=0.29, choice_temperature=1.0)
    state = sampler.init(jnp.full((1, 2), 4), jnp.float32(1))
    keys = jax.random.split(jax.random.key(0), 1)
    noise = lambda key, shape, mode: jnp.array([4.0, 0.0])  # noqa: E731
    with (
        mock.patch.object(jax.random, "gumbel", noise),
        mock.patch.object(tokens, "draw", lambda keys, log_x: jnp.argmax(log_x, -1)),
    ):
        found = sampler.step(process, ladder(2), state, jnp.float32(1), s, keys)
    np.testing.assert_array_equal(found.z[0] != 4, np.arange(2) == first)


def test_classifier_free_guidance_of_tokens():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 5))  # classes 0, 1 and none
    spec = DataSpec(shape=(4,), num_classes=2, num_tokens=5)
    joint = enumerated.product(*[[0.2] * 5] * 4)
    process = pushed.process(joint)

    def predict(z_t, t, cond):
        return process.predict(logits[cond["label"]], z_t, t)

    guide = ClassifierFree(guidance_scale=2.5)
    z = jnp.array([[5, 5, 5, 5], [5, 2, 5, 0]])
    cond = {"label": jnp.array([1, 0])}
    found = np.exp(guide(predict, process, spec)(z, jnp.float32(0.5), cond).logits)
    p = np.float64(jax.nn.softmax(logits))
    for row, label in enumerate((1, 0)):
        wanted = p[label] ** 2.5 * p[2] ** -1.5
        wanted /= wanted.sum(-1, keepdims=True)
        for i, symbol in enumerate(np.asarray(z[row])):
            known = np.eye(6)[symbol][:5] if symbol < 5 else wanted[i]
            np.testing.assert_allclose(found[row, i], known, atol=1e-6)
