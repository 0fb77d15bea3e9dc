"""Students of moment matching on a mixture of two gaussians, with and without guidance.

The label says the component with probability 3/4, so that the teacher sampled given a
label finds the other component in a quarter of the samples, and guidance in fewer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys
from moments import PROCESS

from diffusionlab.distillation import base
from diffusionlab.distillation.moment_matching import MomentMatching
from diffusionlab.models import analytic
from diffusionlab.objectives import weightings
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.types import DataSpec, Network, Prediction, Teacher

MEANS, STD, SHARE = np.array([[-1.0], [1.0]]), 0.3, 0.75
WIDTH, STEPS, SIZE = 32, 8, 512


def exact(z, t, label):
    """E[x | z_t, label] and E[eps | z_t, label]; label 2 is none."""
    agrees = label[:, None] == jnp.arange(2)
    weights = jnp.where(agrees, SHARE, 1 - SHARE)
    weights = jnp.where(label[:, None] == 2, 0.5, weights)
    alpha, sigma = PROCESS.schedule.alpha_sigma(jnp.broadcast_to(t, z.shape[:1]))
    variances = np.full((2, 1), STD**2)
    return analytic.denoise(z, alpha, sigma, jnp.log(weights), MEANS, variances)


def network():
    """What a network adds to the exact denoiser; nothing at the start."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "in": jax.random.normal(keys[0], (4, WIDTH)),
            "mid": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5,
            "out": jnp.zeros((WIDTH, 1)),
        }

    def apply(params, z, cond, *, train=False, key=None):
        t, label = cond["t"][:, None], cond["label"][:, None] * 2.0 - 1
        seen = jnp.concatenate([z, 2 * t - 1, label, jnp.ones_like(t)], axis=1)
        hidden = jnp.tanh(jnp.tanh(seen @ params["in"]) @ params["mid"])
        return exact(z, cond["t"], cond["label"])[0] + hidden @ params["out"]

    return Network(init, apply, ())


TEACHER = Teacher(
    lambda params, z, t, cond: Prediction(*exact(z, t, cond["label"])), True
)


def data(key, size):
    label_key, flip, noise = jax.random.split(key, 3)
    label = jax.random.bernoulli(label_key, shape=(size,)).astype(jnp.int32)
    other = jax.random.bernoulli(flip, 1 - SHARE, (size,))
    mean = jnp.asarray(MEANS)[jnp.where(other, 1 - label, label)]
    x = mean + STD * jax.random.normal(noise, (size, 1))
    return {"x": x.astype(jnp.float32), "label": label}


def train(guidance_scale, turns=600):
    """Returns `predict(z_t, t, label)` of a student after so many turns."""
    objective = MomentMatching(
        process=PROCESS,
        networks={base.NETWORK: network()},
        spec=DataSpec((1,), num_classes=2),
        teacher=TEACHER,
        weighting=weightings.MinSnr(gamma=100.0),
        num_steps=STEPS,
        times_option="grid",
        guidance_scale=guidance_scale,
    )
    rates = {"aux": 5e-3, "student": 2e-3}
    rules = {
        role: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(optax.linear_schedule(rate, 0.0, turns), b1=0.0, b2=0.99),
        )
        for role, rate in rates.items()
    }
    start = network().init(jax.random.key(0))

    def turn(carry, index):
        params, states = dict(carry[0]), dict(carry[1])
        for use, role in enumerate(("aux", "student")):
            key = jax.random.fold_in(jax.random.key(1), 2 * index + use)
            inputs = toys.inputs(None, key, params=params)
            inputs = inputs._replace(batch=data(jax.random.fold_in(key, 9), SIZE))
            loss = objective.phases[role].loss
            grads, _ = jax.grad(loss, has_aux=True)({role: params[role]}, inputs)
            updates, states[role] = rules[role].update(grads[role], states[role])
            params[role] = optax.apply_updates(params[role], updates)
        return (params, states), None

    carry = (
        {role: start for role in rules},
        {role: rule.init(start) for role, rule in rules.items()},
    )
    (params, _), _ = jax.jit(
        lambda carry: jax.lax.scan(turn, carry, jnp.arange(turns))
    )(carry)
    return lambda z, t, cond: objective.predict(params, z, t, cond)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample(predict, num_steps, label):
    sampler = Ancestral(num_steps=num_steps, noise_exponent=0.0)
    keys = jax.random.split(jax.random.key(5), len(label))
    given = lambda z, t: predict(z, t, {"label": label})  # noqa: E731
    return samplers.sample(sampler, PROCESS, given, keys, (1,))


def test_student_beats_its_teacher_and_guidance_sharpens_the_proportions():
    batch = data(jax.random.key(7), 20_000)
    label, sign = batch["label"], np.asarray(batch["label"]) * 2 - 1

    def found(predict):
        x = np.asarray(sample(predict, STEPS, label))[:, 0]
        distance = np.mean(np.abs(np.sort(x) - np.sort(np.asarray(batch["x"])[:, 0])))
        return distance, np.mean(x * sign > 0)

    teacher = lambda z, t, cond: TEACHER.predict({}, z, t, cond)  # noqa: E731
    of_teacher, _ = found(teacher)
    of_student, share = found(train(1.0))
    assert of_student < 0.7 * of_teacher
    np.testing.assert_allclose(share, SHARE, atol=0.03)
    _, sharper = found(train(2.0))
    assert sharper > SHARE + 0.08
