"""TRACT on N(0, c²) data, phase by phase, in closed form."""

import functools

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
import toys

from diffusionlab.distillation import fine_steps
from diffusionlab.distillation.tract import Tract
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers.addim import Addim
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Teacher, Transition

PROCESS = tables.PROCESS


def make(number=1, c=1.0, **fields):
    given = {
        "process": PROCESS,
        "networks": {"denoiser": tables.network(number)},
        "spec": DataSpec((1,)),
        "teacher": tables.teacher(c),
        "steps_per_phase": 100,
    }
    return Tract(**{**given, **fields})


def solved(before, number, teacher_x):
    """The a `[before + 1]` that equation 2 gives back in the phase before -> number.

    Args:
      teacher_x: (z, t) -> the teacher's x.
    """
    objective, each = make(before), before // number

    def body(a, step):
        segment = jnp.arange(number)
        fine = fine_steps.fine_steps(
            segment, jnp.full_like(segment, step), number, each
        )
        z = jnp.ones((number, 1))
        found = objective.target({"a": a}, teacher_x(z, fine.t), z, fine, {})
        return a.at[segment * each + step].set(found[:, 0]), None

    solve = jax.jit(lambda a: jax.lax.scan(body, a, jnp.arange(1, each + 1))[0])
    return solve(jnp.zeros(before + 1))


def exact(c):
    return lambda z, t: tables.teacher(c).predict({}, z, t, {}).x


@functools.cache
def phases(c, counts):
    """a of the last of the phases counts[0] -> counts[1] -> ..."""
    a, teacher = None, exact(c)
    for before, number in zip(counts[:-1], counts[1:], strict=True):
        if a is not None:
            known, size = a, len(a) - 1

            def teacher(z, t, known=known, size=size):
                return tables.network(size).apply({"a": known}, z, {"t": t})

        a = solved(before, number, teacher)
    return a


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1024, 32, 1), 0.99759),
        ((256, 1), 0.99041),
        ((64, 16, 4, 1), 0.96218),
    ],
)
def test_one_step_is_all_of_the_teachers(counts, expected):
    variance = float(phases(1.0, counts)[-1]) ** 2
    assert variance == pytest.approx(expected, abs=2e-5)
    steps = counts[0]
    known = np.cos(np.pi / (2 * steps)) ** (2 * steps)
    # As many roundings by 6e-8 at most as there are fine steps.
    assert variance == pytest.approx(known, abs=1.2e-7 * steps)


def test_a_phase_leads_to_the_step_of_the_probability_flow():
    for t, b, number, expected in (
        (0.5, 0.0, 2, 0.632456),
        (1.0, 0.5, 2, 0.118034),
        (1.0, 0.0, 1, 0.5),
    ):
        coarse, fine = (
            float(phases(0.5, (steps, number))[round(t * steps)])
            for steps in (256, 512)
        )
        assert tables.jump(t, b, 0.5) == pytest.approx(expected, abs=1e-6)
        # DDIM is of first order; what is left is of second, (1 / 256)².
        assert 2 * fine - coarse == pytest.approx(expected, abs=3e-5)


def test_as_many_steps_as_the_teacher_learn_its_x():
    objective = make(8, teacher_steps=8, middle_steps=(), num_steps=8)
    segment = jnp.arange(8)
    fine = fine_steps.fine_steps(segment, jnp.ones_like(segment), 8, 1)
    z = jnp.linspace(-2, 2, 8)[:, None]
    first = jnp.cos(z)
    found = objective.target({"a": jnp.full(9, jnp.inf)}, first, z, fine, {})
    np.testing.assert_array_equal(found, first)


def loss_of(objective, phase, params, ema, x, key=3):
    loss = objective.phases[phase].loss
    inputs = toys.inputs(
        x, jax.random.key(key), params=params, ema={"self": {"student": ema}}
    )
    return loss({"student": params["student"]}, inputs)


def test_the_quick_average_is_what_is_followed():
    """With one segment from clean data on, the target is x_self(z_s, s) for s > 0."""
    number = 16
    objective = make(number, teacher_steps=number, middle_steps=(), num_steps=1)
    x = jax.random.normal(jax.random.key(0), (64, 1))
    flat = lambda value: {"a": jnp.full(number + 1, value)}  # noqa: E731

    @jax.jit
    def run(student, average, previous):
        def loss(params, average):
            return loss_of(objective, "first", params, average, x)[0]

        params = {"student": student, "previous": previous}
        gradients = jax.grad(loss, (0, 1))(params, average)
        return loss(params, average), gradients

    one = run(flat(0.5), flat(0.5), flat(0.5))
    assert float(run(flat(0.5), flat(0.4), flat(0.5))[0]) != float(one[0])
    assert float(run(flat(0.5), flat(0.5), flat(0.4))[0]) == float(one[0])
    params, average = one[1]
    assert np.any(params["student"]["a"]) and not np.any(average["a"])


def test_later_phases_learn_from_the_one_before():
    objective = make(16, teacher_steps=16, middle_steps=(4,), num_steps=1)
    x = jax.random.normal(jax.random.key(0), (64, 1))
    flat = lambda value: {"a": jnp.full(17, value)}  # noqa: E731

    @jax.jit
    def run(previous):
        params = {"student": flat(0.5), "previous": previous}
        return loss_of(objective, "later", params, flat(0.5), x)

    (one, metrics), (other, _) = run(flat(0.3)), run(flat(0.4))
    assert float(one) != float(other)
    # The step of `inputs` is 0: M and N are still those of the first phase.
    assert float(metrics["teacher_steps"][0]) == 16
    assert float(metrics["student_steps"][0]) == 4


def test_the_solved_student_has_no_gradient():
    objective = make(16, 0.5, teacher_steps=16, middle_steps=(), num_steps=4)
    x = 0.5 * jax.random.normal(jax.random.key(0), (64, 1))
    a = phases(0.5, (16, 4))

    def loss(own):
        params = {"student": own, "previous": own}
        return loss_of(objective, "first", params, {"a": a}, x)[0]

    gradient = jax.jit(jax.grad(loss))
    # Weights are at most SNR = 100 at t = 1 / 16; a is rounded by 3e-8.
    np.testing.assert_allclose(gradient({"a": a})["a"], 0.0, atol=1e-5)
    assert np.any(np.abs(gradient({"a": a + 0.1})["a"][1:]) > 1e-2)


def test_the_phases():
    objective = make(teacher_steps=64, middle_steps=(16, 8), num_steps=2)
    at = [0, 99, 100, 200, 299, 300, 1000]
    found = [tuple(map(int, objective.step_counts_at(jnp.int32(step)))) for step in at]
    assert found == [*[(64, 16)] * 2, (16, 8), *[(8, 2)] * 4]
    changes = {s: objective.transition(s) for s in range(500)}
    assert {s for s, change in changes.items() if change} == {100, 200}
    assert objective.transitions == {
        changes[100]: Transition(
            {"previous": "student@main", "student": "student@main"}, ("student",)
        )
    }
    assert [objective.phase(s) for s in (0, 99, 100, 300)] == [
        *("first", "first", "later", "later")
    ]
    student, previous = objective.roles["student"], objective.roles["previous"]
    assert set(student.ema) == {"main", "self"} and student.init == "teacher"
    assert not previous.trainable


def test_the_student_is_sampled_in_its_own_steps():
    objective = make(num_steps=4)
    objective.check_sampler(Ddim(num_steps=4))
    for sampler in (Ddim(num_steps=2), Addim(num_steps=4)):
        with pytest.raises(ValueError, match="num_steps|ddim"):
            objective.check_sampler(sampler)


@pytest.mark.parametrize(("scale", "first"), [(1.0, 5.0), (2.0, 6.0)])
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
        jnp.ones((32, 1)),
        params={"student": params, "previous": params},
        ema={"self": {"student": net.init(jax.random.key(1))}},
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
        ({"steps_per_phase": 0}, "steps_per_phase: must be at least 1"),
        ({"num_steps": 3}, "middle_steps: .* multiple of the next, got 1024, 32, 3"),
        ({"middle_steps": (0,)}, "middle_steps: .* got 1024, 0, 1"),
        ({"teacher_steps": 16}, "middle_steps: .* got 16, 32, 1"),
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
