"""EM distillation: its gradient by formula, Diff-Instruct as a limit, and options."""

import functools

import costs
import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from diffusionlab.distillation import em_distillation
from diffusionlab.distillation.diff_instruct import DiffInstruct
from diffusionlab.distillation.em_distillation import Chain, EmDistillation
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import Teacher

make = functools.partial(scores.make, EmDistillation)
NET = costs.wide(8, 2)


def parameters():
    """Of networks that are not linear, each role's own."""
    keys = jax.random.split(jax.random.key(4), 3)
    own = {name: NET.init(k) for name, k in zip(("student", "aux"), keys, strict=False)}
    return own | {"teacher": NET.init(keys[2])}


def curved(cls, process=scores.PROCESS, **fields):
    def predict(params, z, t, cond):
        return process.predict(NET.apply(params, z, cond), z, t)

    teacher = Teacher(predict, has_null_label=True)
    networks = {"denoiser": NET}
    return scores.make(
        cls, process=process, networks=networks, teacher=teacher, **fields
    )


def gradient(objective, phase="student", size=8):
    found = parameters()
    inputs = scores.inputs(found, key=7, size=size, dimension=costs.SIZE)
    loss = objective.phases[phase].loss
    return jax.grad(lambda p: loss(p, inputs)[0])({"student": found["student"]})


def close(found, known, factor):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(known)) * factor
    assert scale > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, factor * b, atol=1e-5 * scale),
        found,
        known,
    )


def test_no_langevin_steps_are_diff_instruct_and_one_is_gamma_times_it():
    known = gradient(curved(DiffInstruct))
    close(gradient(curved(EmDistillation, num_langevin_steps=0)), known, 1.0)
    one = dict(num_langevin_steps=1, gamma_z=0.0, gamma_eps=0.16)
    close(gradient(curved(EmDistillation, **one)), known, 0.16)


@pytest.mark.parametrize("num_chains", [1, 2])
def test_the_gradient_is_the_pullback_at_the_last_latent(monkeypatch, num_chains):
    size = 6 * num_chains
    shape = (size, costs.SIZE)
    z, drift = jax.random.normal(jax.random.key(8), (2, *shape))
    t = jnp.linspace(0.1, 0.9, 6)
    weight = jnp.arange(1.0, 7.0)
    chain = Chain(z, drift + 1, drift, drift, drift, jnp.ones(()), drift)
    monkeypatch.setattr(em_distillation, "langevin", lambda *_, **__: chain)

    class Times:
        def sample(self, key, batch_size, schedule):
            return t, weight

    objective = curved(
        EmDistillation, times=Times(), noise_power=1.5, num_chains=num_chains
    )
    alpha, sigma = scores.PROCESS.schedule.alpha_sigma(jnp.repeat(t, num_chains))
    factor = jnp.repeat(weight, num_chains) * (sigma / alpha) ** 0.5 / size
    student = parameters()["student"]
    # The start, z_t = z, is at t = 1 but for its last digits.
    _, pull_back = jax.vjp(lambda p: NET.apply(p, z, {}), student)
    (known,) = pull_back(-factor[:, None] * drift)
    close(gradient(objective, size=6)["student"], known, 1.0)


@pytest.mark.parametrize("number", [0, 2])
def test_no_gradient_flows_but_into_the_student(number):
    objective = curved(EmDistillation, num_langevin_steps=number)
    found = parameters()

    def loss(others):
        given = {**found, **others}
        inputs = scores.inputs(given, size=4, dimension=costs.SIZE)
        return objective.loss({"student": found["student"]}, inputs)[0]

    for leaf in jax.tree.leaves(jax.grad(loss)(found)):
        assert not np.any(leaf)


def test_each_number_of_langevin_steps_is_a_phase_of_its_own():
    objective = make(num_langevin_steps=2, langevin_schedule=((4, 0), (8, 3)))
    assert set(objective.phases) == {"aux", "student_2", "student_0", "student_3"}
    assert set(objective.evaluations) == set(objective.phases)
    names = [objective.phase(step) for step in range(1, 12, 2)]
    assert names == ["student_2"] * 2 + ["student_0"] * 2 + ["student_3"] * 2
    assert {objective.phase(step) for step in range(0, 12, 2)} == {"aux"}
    assert set(make().phases) == {"aux", "student"}
    assert "student_8" not in make(langevin_schedule=((0, 1), (9, 2))).phases
    assert [make(aux_steps=2).phase(step) for step in range(3)] == [
        *("aux", "aux", "student")
    ]
    drifts = []
    for name in ("student_2", "student_3"):
        found = scores.params(0.5)
        loss = jax.jit(objective.phases[name].loss)
        own = {"student": found["student"]}
        total, count = loss(own, scores.inputs(found, size=64))[1]["drift"]
        drifts.append(float(total / count))
    # The first steps of a chain add up: (1 - 0.84^3) / (1 - 0.84^2) of each, squared.
    assert drifts[1] / drifts[0] == pytest.approx(1.91, rel=0.2)


@pytest.mark.parametrize(
    ("phase", "fields"),
    [
        ("aux", {"num_steps": 2}),
        ("student", {"num_langevin_steps": 0}),
        ("student", {"num_langevin_steps": 1}),
        ("student", {"num_langevin_steps": 1, "num_chains": 2, "num_steps": 2}),
        ("student", {"num_langevin_steps": 1, "gamma_z": 0.0}),
        ("student", {"num_langevin_steps": 1, "guidance_scale": 2.0}),
    ],
)
def test_evaluations_are_what_xla_counts(phase, fields):
    """A loop counts once, so K is 0 or 1."""
    counted, stated = scores.evaluations(EmDistillation, phase, **fields)
    assert counted == pytest.approx(stated, rel=0.1)


def test_metrics_are_finite_at_both_ends_of_time():
    class Ends:
        def sample(self, key, batch_size, schedule):
            return jnp.linspace(0, 1, batch_size), jnp.ones(batch_size)

    process = Gaussian(schedule=Cosine(), prediction="v")
    fields = dict(times=Ends(), num_langevin_steps=3, first_logsnr=-6.0)
    objective = curved(EmDistillation, process=process, **fields)
    found = parameters()
    loss = objective.phases["student"].loss
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    inputs = scores.inputs(found, size=8, dimension=costs.SIZE)
    (_, metrics), slopes = grad({"student": found["student"]}, inputs)
    for leaf in jax.tree.leaves((metrics, slopes)):
        assert np.all(np.isfinite(leaf))
    assert metrics["loss"][0] == metrics["score_difference"][0] > 0
    assert metrics["score_difference_by_logsnr"][0].shape == (10,)
    total, count = metrics["z_norm2"]
    assert 0.1 < total / count < 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher": None}, "config.teacher: missing"),
        ({"gamma_eps": 1.0}, r"gamma_eps: must be in \(0, 1\)"),
        ({"gamma_z": -0.1}, "and gamma_z in"),
        ({"num_chains": 0}, "num_chains: must be at least 1"),
        ({"cancellation": "half"}, "cancellation: expected one of none, chain, plain"),
        ({"num_langevin_steps": -1}, "num_langevin_steps: must be at least 0"),
        ({"langevin_schedule": ((5, 1), (2, 2))}, "langevin_schedule: expected pairs"),
        ({"langevin_schedule": (3,)}, "langevin_schedule: expected pairs"),
        ({"num_langevin_steps": 0, "cancellation": "none"}, "0 has no chain"),
        ({"langevin_schedule": ((2, 0),), "num_chains": 2}, "0 has no chain"),
        ({"guidance_scale": 2.0}, "guidance_scale: 2.0 needs a teacher"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        make(**fields)
