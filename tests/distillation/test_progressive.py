"""Progressive distillation on N(0, c²) data, round by round, in closed form."""

import functools

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
import toys

from diffusionlab.distillation import base, fine_steps
from diffusionlab.distillation.progressive import Progressive
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Prediction, Teacher, Transition

PROCESS = tables.PROCESS


def make(number=1, c=1.0, **fields):
    given = {
        "process": PROCESS,
        "networks": {"denoiser": tables.network(number)},
        "spec": DataSpec((1,)),
        "teacher": tables.teacher(c),
        "steps_per_round": 100,
    }
    return Progressive(**{**given, **fields})


def steps(number):
    segment = jnp.arange(number)
    return fine_steps.fine_steps(segment, jnp.full_like(segment, 2), number, 2)


@functools.cache
def rounds(first, c):
    """N -> a `[N + 1]` of the student at the end of the round of N steps."""
    objective, found, number = make(first, c), {}, first
    while number:

        def teach(z, t, cond, number=number):
            if number == first:
                x = tables.teacher(c).predict({}, z, t, cond)
            else:
                table = tables.network(2 * number)
                x = PROCESS.predict(
                    table.apply({"a": found[2 * number]}, z, {"t": t}), z, t
                )
            return x, x

        z = jnp.ones((number, 1))
        target = jax.jit(
            lambda z, f=teach: objective.target(f, z, z, steps(len(z)), {})
        )
        found[number] = jnp.append(0.0, target(z)[:, 0])
        number //= 2
    return found


@pytest.mark.parametrize(
    ("teacher_steps", "expected"), [(64, 0.96218), (256, 0.99041), (1024, 0.99759)]
)
def test_one_step_is_all_of_the_teachers(teacher_steps, expected):
    variance = float(rounds(teacher_steps // 2, 1.0)[1][1]) ** 2
    assert variance == pytest.approx(expected, abs=2e-5)
    known = np.cos(np.pi / (2 * teacher_steps)) ** (2 * teacher_steps)
    assert variance == pytest.approx(known, abs=3e-6)


def test_a_round_makes_the_map_of_twice_the_steps():
    found = rounds(32, 0.5)
    z = jax.random.normal(jax.random.key(0), (8, 1))
    expected = np.prod(tables.factors(64, 0.5)) * z
    for number in (1, 4, 32):
        sampler = Ddim(num_steps=number)
        objective = make(number, num_steps=number)
        objective.check_sampler(sampler)
        params = {"student": {"a": found[number]}}

        @jax.jit
        def draw(z, key, objective=objective, sampler=sampler, params=params):
            predict = lambda z, t: objective.predict(params, z, t, {})  # noqa: E731
            times = sampler.times(PROCESS.schedule)
            keys = jax.random.split(key, 8)
            return samplers.solve(sampler, PROCESS, predict, z, times, keys).x

        x = draw(z, jax.random.key(1))
        np.testing.assert_allclose(x, expected, rtol=1e-5)
        np.testing.assert_array_equal(x, draw(z, jax.random.key(2)))


def test_the_last_step_has_the_teachers_own_x():
    asked = []

    def teach(z, t, cond):
        asked.append((z, t))
        found = Prediction(jnp.cos(3 * z) + lift(t), z)
        return found, found

    lift = lambda t: t[:, None]  # noqa: E731
    z = jnp.linspace(-1, 1, 4)[:, None]
    found = make().target(teach, z, z, steps(4), {})
    (_, t), (z_m, m) = asked
    np.testing.assert_allclose(t, np.arange(1, 5) / 4, rtol=1e-6)
    np.testing.assert_allclose(m, (np.arange(1, 5) - 0.5) / 4, rtol=1e-6)
    first = jnp.cos(3 * z) + lift(t)
    np.testing.assert_allclose(z_m, base.ddim(PROCESS, first, z, t, m), rtol=1e-6)
    np.testing.assert_array_equal(found[0], (jnp.cos(3 * z_m) + lift(m))[0])


def test_the_solved_student_has_no_gradient_and_another_one_has():
    objective = make(4, 0.5, num_steps=4, num_rounds=1)
    x = 0.5 * jax.random.normal(jax.random.key(0), (64, 1))

    @jax.jit
    def gradients(a, previous):
        def loss(own, everyone):
            inputs = toys.inputs(x, params=everyone)
            first = objective.first_loss(own, inputs)[0]
            return first, objective.later_loss(own, inputs)[0]

        params = {"student": {"a": a}}
        everyone = {**params, "previous": {"a": previous}}
        return jax.jacobian(loss, (0, 1))(params, everyone)

    a = rounds(4, 0.5)[4]
    (first, frozen), (later, frozen_later) = gradients(a, a)
    # Weights are at most SNR = 6 at t = 1 / 4; a is rounded by 3e-8.
    np.testing.assert_allclose(first["student"]["a"], 0.0, atol=1e-6)
    assert np.any(np.abs(later["student"]["a"]) > 1e-3)
    for leaf in jax.tree.leaves((frozen, frozen_later)):
        assert not np.any(leaf)
    (first, _), _ = gradients(a + 0.1, a)
    assert np.all(np.abs(first["student"]["a"][1:]) > 1e-3)


def test_addim_of_the_teacher_adds_variance():
    """From pure noise, two steps of aDDIM by hand; x_hat = 0 at t = 1."""
    x, z = jnp.full((1, 2), 0.3), jnp.array([[1.0, -1.0]])

    def teach(z, t, cond):
        plain = PROCESS.predict(0.5 * z * (t < 1)[:, None], z, t)
        return plain, plain

    xvar = 0.75
    objective = make(xvar_frac=xvar)
    found = objective.target(teach, x, z, steps(1), {})
    # At t = 1 eps = z has mean square 1, and x_hat = 0 the squared error 0.09.
    alpha, sigma = tables.scales(0.5)
    z_m = np.sqrt(sigma**2 + alpha**2 * 0 + xvar * 0.09 * tables.scales(0.5)[0] ** 2)
    z_m = z_m * np.float64(z)
    x_m = 0.5 * z_m
    eps_m = (z_m - alpha * x_m) / sigma
    q = xvar * np.mean((x_m - 0.3) ** 2) / np.mean(eps_m**2)
    np.testing.assert_allclose(found, x_m + np.sqrt(q) * eps_m, rtol=1e-5)


@pytest.mark.parametrize("weight", ["truncated_snr", "snr+1"])
def test_the_loss_is_the_larger_of_two_errors_or_that_of_v(weight):
    number = 8
    a = jnp.linspace(0.1, 0.9, number + 1)
    objective = make(number, 0.5, num_steps=number, num_rounds=1, weight=weight)
    params = {"student": {"a": a}}
    x = 0.5 * jax.random.normal(jax.random.key(0), (256, 1))
    inputs = toys.inputs(x, key=3, params=params)
    loss, metrics = jax.jit(objective.first_loss)(params, inputs)
    keys = base.split(inputs.key, 3)
    i = jax.random.randint(keys[0], (256,), 0, number) + 1
    z, _ = PROCESS.corrupt(keys[1], x, i / number)
    error = np.float64(((a - rounds(number, 0.5)[number])[i] * z[:, 0]) ** 2)
    alpha, sigma = tables.scales(i / number)
    eps_error = error * (alpha / sigma) ** 2
    expected = error + eps_error if weight == "snr+1" else np.maximum(error, eps_error)
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-4)
    assert float(metrics["mse"][0]) == pytest.approx(error.sum(), rel=1e-4)
    assert float(metrics["num_steps"][0]) == number


def test_the_rounds():
    objective = make(num_steps=2, num_rounds=3)
    at = [0, 99, 100, 199, 200, 299, 300, 1000]
    assert [int(objective.num_steps_at(jnp.int32(s))) for s in at] == [
        *(8, 8, 4, 4, 2, 2, 2, 2)
    ]
    changes = {s: objective.transition(s) for s in range(500)}
    assert {s for s, change in changes.items() if change} == {100, 200}
    assert objective.transitions == {
        changes[100]: Transition({"previous": "student"}, ("student",))
    }
    assert [objective.phase(s) for s in (0, 99, 100, 200)] == [
        *("first", "first", "later", "later")
    ]
    assert not objective.roles["previous"].trainable
    assert objective.roles["student"].init == "teacher"
    one = make(num_steps=2, num_rounds=1)
    assert not any(one.transition(s) for s in range(500))


@pytest.mark.parametrize(("scale", "first"), [(1.0, 5.0), (2.0, 7.0)])
def test_the_network_evaluations_are_those_that_xla_counts(scale, first):
    net = costs.wide()

    def predict(params, z, t, cond):
        # XLA would see that two equal answers are one.
        seen = z + cond["label"][:, None]
        return PROCESS.predict(net.apply(params["denoiser"], seen, cond), z, t)

    objective = make(
        networks={"denoiser": net},
        teacher=Teacher(predict, has_null_label=True),
        spec=DataSpec((1,), 2),
        guidance_scale=scale,
    )
    assert objective.evaluations == {"first": first, "later": 5.0}
    params = net.init(jax.random.key(0))
    inputs = toys.inputs(
        jnp.ones((32, 1)), params={"student": params, "previous": params}
    )
    inputs.params["teacher"] = {"denoiser": params}
    inputs.batch["label"] = jnp.zeros(32, jnp.int32)
    for phase, expected in objective.evaluations.items():
        found = costs.network_evaluations(objective, phase, inputs)
        assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "config.teacher: missing"),
        ({"guidance_scale": 2.0}, "guidance_scale: 2.0 needs a teacher"),
        ({"num_steps": 0}, "num_steps: must be at least 1"),
        ({"num_rounds": 0}, "num_rounds: must be at least 1"),
        ({"steps_per_round": 0}, "steps_per_round: must be at least 1"),
        ({"xvar_frac": -1.0}, "xvar_frac: must be at least 0"),
        ({"weight": "snr"}, r"weight: expected truncated_snr or snr\+1, got 'snr'"),
        (
            {"process": Gaussian(schedule=Cosine(), prediction="eps")},
            "process.prediction: 'eps' says nothing",
        ),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
