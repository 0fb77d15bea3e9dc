"""Moment matching in parameter space, on N(0, c²) data and a teacher of one number."""

import dataclasses

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from moments import (
    PROCESS,
    draws,
    moments,
    posterior,
    replace_noise,
    replace_times,
    scales,
    slope,
    tanh,
    total,
)

from diffusionlab.distillation import base, moment_matching
from diffusionlab.distillation.moment_matching_instant import MomentMatchingInstant
from diffusionlab.objectives import weightings
from diffusionlab.types import DataSpec, Prediction, Teacher


def linear(params, z, t, cond):
    """A teacher with the parameter k, of which only x is used."""
    return Prediction(params["k"] * z, z)


def make(**fields):
    fields = {
        "process": PROCESS,
        "networks": {"denoiser": toys.linear()},
        "spec": toys.SPEC,
        "teacher": Teacher(linear, False),
        "weighting": weightings.V(),
        "preconditioner": "identity",
        **fields,
    }
    return MomentMatchingInstant(**fields)


def see(x, a, k):
    """Inputs whose two halves are both x."""
    teacher = {"k": jnp.float32(k)}
    params = {"student": slope(a), "teacher": teacher}
    return toys.inputs(jnp.repeat(x, 2, axis=0), params=params)


def variance_of_step(a, t, s, c):
    a_z, a_x, v = posterior(t, s)
    return (a_z + a_x * a) ** 2 * total(t, c) + v


# Section 11, item 8.
def test_teachers_step_is_the_gap_of_the_moments(monkeypatch):
    a, t, s, c = 0.2, 0.75, 0.5, 0.5
    x, noise = draws(c)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, t, s)
    student, data = moments(a, t, s, c)
    w, variance = 2.0, variance_of_step(a, t, s, c)  # SNR is 1 at t = 1/2
    assert abs(scales(s)[0] ** 2 - 0.5) < 1e-9
    inputs = see(x, a, data)
    nu, square = make().direction(inputs.params["student"], inputs)
    np.testing.assert_allclose(nu["k"], 2 * w * variance * (student - data), rtol=1e-4)
    np.testing.assert_allclose(square, nu["k"] ** 2, rtol=1e-5)
    # Equation 4.
    loss, metrics = make().loss(inputs.params, inputs)
    np.testing.assert_allclose(loss, 0.5 * nu["k"] ** 2, rtol=1e-4)
    np.testing.assert_allclose(metrics["teacher_grad_norm"][0], abs(nu["k"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("t", "s", "root", "rate"), [(1.0, 0.3, 0.5, 0.2), (0.75, 0.5, 0.395095, 0.2)]
)
def test_student_reaches_the_root_of_the_moments(monkeypatch, t, s, root, rate):
    x, noise = draws(0.5)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, t, s)
    k = moments(0.1, t, s, 0.5)[1]
    objective = make(num_steps=1)
    gradient = jax.grad(lambda p, i: objective.loss({"student": p}, i)[0])

    def turn(a, _):
        return a - rate * gradient(slope(a), see(x, a, k))["a"], None

    found, _ = jax.lax.scan(turn, jnp.float32(0.1), None, length=300)
    np.testing.assert_allclose(found, root, atol=1e-4)


def test_direction_is_the_derivative_in_the_teachers_parameters():
    network, teacher, start = tanh()
    student = {"in": jnp.float32(0.7), "out": jnp.float32(0.6)}
    moment = {"student": {"in": jnp.float32(4.0), "out": jnp.float32(0.25)}}
    x = jax.random.normal(jax.random.key(0), (32, 1))
    theta = {"student": start}
    params = {"student": student, "teacher": theta, "second_moment": moment}
    inputs = toys.inputs(x, params=params)
    fields = {"networks": {"denoiser": network}, "teacher": teacher}
    plain, adam = make(**fields), make(**fields, preconditioner="adam")
    assert adam.needs_second_moment and not plain.needs_second_moment

    def loss(trained, params):
        return adam.loss(trained, inputs._replace(params=params))[0]

    found, others = jax.grad(loss, (0, 1))({"student": student}, params)
    assert all(np.all(g == 0) for g in jax.tree.leaves(others))
    nu, _ = adam.direction(student, inputs)
    ours, _ = plain.direction(student, inputs)
    np.testing.assert_allclose(nu["student"]["in"], ours["student"]["in"] / 2)
    np.testing.assert_allclose(nu["student"]["out"], ours["student"]["out"] * 2)
    key = base.split(inputs.key, 2)[1]
    draw = lambda p: moment_matching.draw(adam, p, {"x": x[1::2]}, key)  # noqa: E731
    made = draw(student)
    ends = [
        jax.tree.map(lambda p, n, sign=sign: p + sign * 1e-2 * n, theta, nu)
        for sign in (1, -1)
    ]
    high, low = (network.apply(end["student"], made.z_s, {}) for end in ends)
    _, pull = jax.vjp(lambda p: draw(p).x, student)
    (expected,) = pull(made.weight[:, None] * (high - low) / 2e-2 / len(made.s))
    for name in start:
        np.testing.assert_allclose(found["student"][name], expected[name], rtol=2e-2)


def test_one_batch_for_both_halves_changes_the_mean(monkeypatch):
    t, s, c, root = 0.75, 0.5, 0.5, 0.395095
    replace_times(monkeypatch, t, s)
    objective, params = make(), {"k": jnp.float32(moments(root, t, s, c)[1])}

    @jax.jit
    def mean(key, shared):
        def one(key):
            x_key, key = jax.random.split(key)
            x = c * jax.random.normal(x_key, (8, 1))
            x = jnp.where(shared, jnp.repeat(x[::2], 2, axis=0), x)
            inputs = toys.inputs(
                x, key, params={"student": slope(root), "teacher": params}
            )
            return objective.loss({"student": slope(root)}, inputs)[0]

        found = jax.vmap(one)(jax.random.split(key, 4000))
        return found.mean(), found.std() / 4000**0.5

    found, error = mean(jax.random.key(0), False)
    assert abs(found) < 4 * error
    split = base.split
    same = lambda key, number: [key] * 2 if number == 2 else split(key, number)  # noqa: E731
    monkeypatch.setattr(base, "split", same)
    mean.clear_cache()
    biased, error = mean(jax.random.key(0), True)
    assert biased > 10 * error


def test_exact_samples_leave_the_teacher_nothing_to_learn(monkeypatch):
    t, s, c = 0.75, 0.5, 0.5
    x, noise = draws(c)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, t, s)
    a = 0.395095
    inputs = see(x, a, moments(a, t, s, c)[1])
    nu, _ = make().direction(slope(a), inputs)
    assert abs(nu["k"]) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_cost_of_a_step(scale):
    network = costs.wide()

    def teach(params, z, t, cond):
        return Prediction(network.apply(params, z, cond), z)

    objective = make(
        networks={"denoiser": network},
        teacher=Teacher(teach, True),
        spec=DataSpec((costs.SIZE,), num_classes=2),
        guidance_scale=scale,
    )
    params = {role: network.init(jax.random.key(0)) for role in ("student", "teacher")}
    inputs = toys.inputs(jnp.ones((32, costs.SIZE)), params=params)
    inputs = inputs._replace(batch={**inputs.batch, "label": jnp.zeros(32, jnp.int32)})
    found = costs.network_evaluations(objective, "train", inputs)
    np.testing.assert_allclose(found, objective.evaluations["train"], rtol=0.1)


def test_wrong_batches_and_words_are_refused():
    with pytest.raises(ValueError, match="config.data.batch_size: .* got 3"):
        make().loss({"student": slope(1)}, toys.inputs(jnp.ones((3, 1))))
    with pytest.raises(ValueError, match="preconditioner: expected adam or identity"):
        make(preconditioner="sgd")
    with pytest.raises(ValueError, match="config.teacher"):
        dataclasses.replace(make(), teacher=None)
