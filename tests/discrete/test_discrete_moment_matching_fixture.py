"""Discrete moment matching on two bits, with every expectation exact.

The bits are equal with probability 0.98, and masked. A generator is a table of logits
by noise symbol n of G, z_t and position, the teacher the exact denoiser.
"""

import functools
import itertools

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusionlab.distillation import discrete_moment_matching as dmm
from diffusionlab.processes.categorical import Categorical
from diffusionlab.schedules.alpha import Linear
from diffusionlab.types import DataSpec

JOINT = enumerated.bits(0.98)
PROCESS = Categorical(spec=DataSpec((2,), num_tokens=2), schedule=Linear())
STATES = jnp.int32(list(itertools.product(range(3), repeat=2)))
HIDDEN = np.asarray(PROCESS.is_noise(STATES))
ALL_MASKED = 8
S, DELTA = (np.arange(24) + 0.5) / 24, (np.arange(6) + 0.5) / 6
# XLA is told by conftest not to optimise; these loops run longer than they compile.
OPTIONS = {"xla_backend_optimization_level": 2}


def tables(joint=JOINT, mask=2):
    """The exact denoiser's log-probabilities by z, `[9, 2, 2]`."""
    probs = np.stack([joint.denoiser(z, 0.5, mask) for z in np.asarray(STATES)])
    return PROCESS.predict(jnp.log(jnp.maximum(probs, 1e-30)), STATES, 0.5).logits


TEACHER = tables()


def both(log_each):
    """Probabilities of the 9 pairs of symbols, `[..., 9]`, of logs `[..., 2, 3]`."""
    first, second = STATES[:, 0], STATES[:, 1]
    return jnp.exp(log_each[..., 0, first] + log_each[..., 1, second])


def answers(logits):
    """log p of a generator `[G, 9, 2, 2]`."""
    z_t = jnp.broadcast_to(STATES, (len(logits), 9, 2))
    return PROCESS.predict(logits, z_t, 0.5).logits


def step(log_x, t, s):
    """q(z_s | z_t, n) of a generator, `[G, 9, 9]`: masked, it is linear in x."""
    return both(
        PROCESS.posterior(log_x, jnp.broadcast_to(STATES, (*log_x.shape[:2], 2)), t, s)
    )


def noised(t):
    """q(z_t) of the data, `[9]`."""
    x = jnp.log(jnp.maximum(jax.nn.one_hot(JOINT.sequences, 2), 1e-30))
    return jnp.asarray(JOINT.probs) @ both(PROCESS.log_marginal(x, t))


def weights(log_x, num_steps):
    """P(s, n, z_t, z_s), `[24, G, 9, 9]`; times are averaged over t."""

    def at(s, delta):
        t = jnp.minimum(1.0, s + delta / num_steps)
        return noised(t)[None, :, None] * step(log_x, t, s)

    each = jax.vmap(jax.vmap(at, (None, 0)), (0, None))
    found = each(jnp.float32(S), jnp.float32(DELTA)).mean(axis=1)
    return found / len(S) / len(log_x)


def moments(log_x, weight):
    """E[p | z_s] of a generator, `[24, 9, 2, 2]`; the teacher's where z_s has none."""
    total = weight.sum(axis=(1, 2))
    mean = jnp.einsum("sntz,ntik->szik", weight, jnp.exp(log_x))
    mean = mean / jnp.maximum(total, 1e-20)[..., None, None]
    return jnp.where(total[..., None, None] > 0, mean, jnp.exp(TEACHER))


def student_loss(logits, num_steps, aux=None):
    """The expectation of equation 2, aux at its optimum unless it is given."""
    log_x = answers(logits)
    weight = jax.lax.stop_gradient(weights(log_x, num_steps))
    if aux is None:
        aux = jnp.log((moments(log_x, weight) + jnp.exp(TEACHER)) / 2)
    aux = jax.lax.stop_gradient(jnp.broadcast_to(aux, (len(S), 9, 2, 2)))
    shape = weight.shape

    def flat(a):
        return jnp.broadcast_to(a, (*shape, *a.shape[4:])).reshape(-1, *a.shape[4:])

    s = flat(jnp.float32(S)[:, None, None, None])
    z_s = flat(STATES[None, None, None])
    each = dmm.student_error(
        flat(log_x[None, :, :, None]),
        flat(aux[:, None, None]),
        flat(TEACHER[None, None, None]),
        dmm.position_weight(PROCESS, z_s, s),
        20.0,
    )
    return (weight.reshape(-1) * each).sum()


@functools.partial(jax.jit, static_argnums=1)
def samples(logits, num_steps):
    """The distribution of a generator's samples, `[2, 2]`."""
    log_x = answers(logits)

    def move(now, n):
        moved = step(log_x, (n + 1) / num_steps, n / num_steps).mean(axis=0)
        return now @ moved, None

    begin = jnp.zeros(9).at[ALL_MASKED].set(1)
    stops = jnp.arange(num_steps - 1.0, -1.0, -1.0)
    return jax.lax.scan(move, begin, stops)[0].reshape(3, 3)[:2, :2]


def distance(logits, num_steps):
    found = np.asarray(samples(logits, num_steps))
    np.testing.assert_allclose(found.sum(), 1, atol=1e-4)
    return 0.5 * np.abs(found - JOINT.table).sum()


gradient = jax.jit(jax.value_and_grad(student_loss), static_argnums=1)


def start(symbols, seed):
    noise = jax.random.normal(jax.random.key(seed), (symbols, 9, 2, 2))
    return TEACHER + 0.1 * noise


@functools.partial(jax.jit, static_argnums=(1, 2), compiler_options=OPTIONS)
def train(logits, num_steps, num_updates):
    """Returns the tables after Adam at 0.05, with exact gradients."""
    adam = optax.adam(0.05)

    def update(carry, _):
        logits, state = carry
        slope = jax.grad(student_loss)(logits, num_steps)
        change, state = adam.update(slope, state)
        return (logits + change, state), None

    carry = logits, adam.init(logits)
    return jax.lax.scan(update, carry, None, num_updates)[0][0]


def entropy(logits):
    """Mean entropy of a token where all are masked."""
    log_x = answers(logits)[:, ALL_MASKED]
    return float(-(jnp.exp(log_x) * log_x).sum(axis=-1).mean())


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 0.48), (2, 0.24)])
def test_the_teacher_in_few_steps(num_steps, expected):
    assert distance(TEACHER[None], num_steps) == pytest.approx(expected, abs=1e-5)
    assert entropy(TEACHER[None]) == pytest.approx(np.log(2), abs=1e-5)


def test_one_step_with_noise_learns_the_correlation():
    found = train(start(2, 0), 1, 2000)
    assert distance(found, 1) <= 0.005
    # Of noise that says which of two equal pairs it is, p (1 - p) = 0.01.
    p = 0.5 - np.sqrt(0.25 - 0.01)
    exact = -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert exact == pytest.approx(0.0565, abs=5e-5)
    assert entropy(found) == pytest.approx(exact, abs=2e-3)


def test_two_steps_with_noise_learn_the_correlation():
    assert distance(train(start(2, 0), 2, 500), 2) <= 0.005


def test_one_step_without_noise_cannot():
    assert distance(train(start(1, 0), 1, 1000), 1) >= 0.40


def test_the_loss_is_not_negative_and_zero_for_the_teachers_equal():
    for seed in range(10):
        table = 2 * jax.random.normal(jax.random.key(seed), (2, 9, 2, 2))
        # Random tables are far from the teacher's moments.
        assert gradient(table, 2)[0] > 0.05
    for found in gradient(table, 2, TEACHER):
        np.testing.assert_array_equal(found, 0)


def minimised(target_of, weight, regularised):
    """The best aux `[9, 2, 2]` of equation 1 for P(n, z_t, z_s), by Newton's method.

    The target is `[G, 9, 2, 2]` by n and z_t.
    """
    weight = weight / jnp.maximum(weight.sum(axis=(0, 1)), 1e-20)
    shape = (*weight.shape, 2, 2)

    def loss(logits):
        aux = PROCESS.predict(logits.reshape(9, 2, 2), STATES, 0.5).logits
        target = target_of[:, :, None]
        if regularised:
            target = target + jnp.exp(TEACHER)
        flat = [jnp.broadcast_to(a, shape).reshape(-1, 2, 2) for a in (target, aux)]
        counted = jnp.broadcast_to(jnp.float32(HIDDEN), shape[:-1]).reshape(-1, 2)
        return (weight.reshape(-1) * dmm.aux_error(*flat, counted)).sum()

    def newton(logits, _):
        # One logit of each pair is free, and those of known tokens do nothing.
        curved = jax.hessian(loss)(logits) + 1e-4 * jnp.eye(36)
        return logits - jnp.linalg.solve(curved, jax.grad(loss)(logits)), None

    logits, _ = jax.lax.scan(newton, jnp.zeros(36), None, 30)
    return PROCESS.predict(logits.reshape(9, 2, 2), STATES, 0.5).logits


@pytest.mark.parametrize("regularised", [True, False])
def test_the_best_auxiliary_network(regularised):
    log_x = answers(jax.random.normal(jax.random.key(4), (2, 9, 2, 2)))
    weight = noised(0.8)[None, :, None] * step(log_x, jnp.float32(0.8), 0.4)
    mean = moments(log_x, weight[None])[0]
    wanted = (mean + jnp.exp(TEACHER)) / 2 if regularised else mean
    fit = jax.jit(minimised, static_argnums=2)
    found = fit(jnp.exp(log_x), weight, regularised)
    np.testing.assert_allclose(jnp.exp(found)[HIDDEN], wanted[HIDDEN], atol=1e-5)
    # It is another one than the teacher, so both answers differ.
    assert np.abs(mean - jnp.exp(TEACHER))[HIDDEN].max() > 0.1


def test_hard_and_soft_targets_agree_on_masks():
    log_x = answers(jax.random.normal(jax.random.key(4), (1, 9, 2, 2)))
    t, s = jnp.float32(0.8), jnp.float32(0.4)
    probs = noised(0.8)
    soft = moments(log_x, (probs[None, :, None] * step(log_x, t, s))[None])[0]
    total, first = jnp.zeros((9, 1, 1)), jnp.zeros((9, 2, 2))
    for x in itertools.product(range(2), repeat=2):
        one = jax.nn.one_hot(jnp.int32(x), 2)
        # P(x | z_t), but tokens that are known stay as they are.
        drawn = jnp.exp((log_x[0] * one).sum(axis=(1, 2)))
        known = jnp.log(jnp.maximum(one, 1e-30))
        to = both(PROCESS.posterior(jnp.broadcast_to(known, (9, 2, 2)), STATES, t, s))
        mass = ((probs * drawn)[:, None] * to).sum(axis=0)[:, None, None]
        total, first = total + mass, first + mass * one
    np.testing.assert_allclose((first / total)[HIDDEN], soft[HIDDEN], atol=1e-5)


def test_soft_targets_are_wrong_under_uniform_noise():
    q = np.float32([0.6, 0.3, 0.1])
    process = Categorical(
        spec=DataSpec((1,), num_tokens=3), schedule=Linear(), noise="uniform"
    )
    t, s = jnp.float32(0.6), jnp.float32(0.3)  # alpha 0.4 and 0.7
    one_hot = jnp.log(jnp.maximum(jnp.eye(3), 1e-30))[:, None]

    def posterior(z):
        return process.posterior(one_hot, jnp.full((3, 1), z), t, s)

    # p(z | x), and p(x | z) by Bayes, by the first of them.
    at_t, at_s = (jnp.exp(process.log_marginal(one_hot, u))[:, 0] for u in (t, s))
    exact_t, exact_s = ((q[:, None] * m / (q @ m)).T for m in (at_t, at_s))
    # P(z_t, x, z_s) of the exact generator.
    to = jnp.exp(jnp.stack([posterior(z)[:, 0] for z in range(3)]))
    joint = (q @ at_t)[:, None, None] * exact_t[:, :, None] * to
    mass = joint.sum(axis=(0, 1))
    hard = joint.sum(axis=0).T / mass[:, None]
    soft = jnp.einsum("txs,tk->sk", joint, exact_t) / mass[:, None]
    np.testing.assert_allclose(hard, exact_s, atol=1e-6)
    assert np.abs(soft - exact_s).max() == pytest.approx(0.3172, abs=5e-5)


def test_in_many_steps_the_teacher_is_a_student():
    assert distance(TEACHER[None], 64) == pytest.approx(0.48 / 64, abs=1e-4)
    for found in gradient(TEACHER[None], 64, TEACHER):
        np.testing.assert_array_equal(found, 0)
    # The moments are nearly the teacher's, too.
    few, many = (gradient(TEACHER[None], k)[0] for k in (1, 64))
    assert 0 <= many < 0.02 * few
