"""Diff-Instruct on gaussian data: its gradient is that of the reverse KL divergence."""

import functools
import itertools

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from diffusionlab.distillation.diff_instruct import DiffInstruct
from diffusionlab.distillation.em_distillation import EmDistillation

make = functools.partial(scores.make, DiffInstruct)


class Half:
    """t = 1/2 alone: alpha² = sigma² = 1/2."""

    def sample(self, key, batch_size, schedule):
        return jnp.full(batch_size, 0.5), jnp.ones(batch_size)


@pytest.fixture
def exact_average(monkeypatch):
    """Draws z and eps at points whose mean of any quadratic is the expectation."""
    points = 2**0.5 * jnp.array([[1.0, -1, 0, 0], [0, 0, 1, -1]])[..., None]

    def begin():
        drawn = itertools.chain(points, itertools.repeat(jnp.zeros((4, 1))))
        monkeypatch.setattr(jax.random, "normal", lambda *_, **__: next(drawn))

    return begin


def slope(objective, theta):
    """The gradient in theta of a batch of four, for c = 1."""
    found = scores.params(theta, c=1.0)
    inputs = scores.Inputs({"x": jnp.zeros((4, 1))}, jax.random.key(0), 0, found, {})
    loss = objective.phases["student"].loss
    grad = jax.grad(lambda p: loss(p, inputs)[0])
    return float(grad({"student": found["student"]})["student"]["a"])


@pytest.mark.parametrize("theta", [0.5, 2.0])
def test_the_gradient_is_that_of_reverse_kl(exact_average, theta):
    """d KL(p_t, q_t) / d theta = alpha² theta (1 / V_q - 1 / V_p), -0.15 at 0.5."""
    v_p = 0.5 * theta**2 + 0.5
    known = 0.5 * theta * (1 - 1 / v_p)
    exact_average()
    assert slope(make(times=Half()), theta) == pytest.approx(known, rel=1e-5)
    if theta == 0.5:
        assert known == pytest.approx(-0.15)
    exact_average()
    # One Langevin step of EM: gamma_eps times that, -0.0240.
    em = dict(num_langevin_steps=1, gamma_z=0.0, noise_power=0.0, times=Half())
    found = slope(scores.make(EmDistillation, **em), theta)
    assert found == pytest.approx(0.16 * known, rel=1e-5)


def test_a_matched_student_has_no_gradient_and_others_go_to_it():
    assert abs(float(scores.slope(make(), scores.C))) < 1e-6
    starts = [0.3 * scores.C, 3 * scores.C, -3 * scores.C]
    ends = scores.flow(make(), starts, rate=0.1, num_steps=100)
    np.testing.assert_allclose(ends, np.sign(starts) * scores.C, rtol=1e-3)


def test_no_gradient_flows_but_into_the_student():
    found = scores.params(0.5)
    own = {"student": found["student"]}

    def loss(others):
        return make().loss(own, scores.inputs({**found, **others}, size=8))[0]

    for leaf in jax.tree.leaves(jax.grad(loss)(found)):
        assert not np.any(leaf)


def test_the_surrogate_is_no_measure_and_the_loss_is():
    sizes = []
    for theta in (0.4, 0.7, scores.C):
        found = scores.params(theta)
        own = {"student": found["student"]}
        _, metrics = make().loss(own, scores.inputs(found, size=64))
        assert metrics["surrogate"][0].shape == ()
        sizes.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert sizes[0] > 10 * sizes[1] > 1e-3 and sizes[2] < 1e-12


@pytest.mark.parametrize(
    ("phase", "fields"),
    [
        ("aux", {}),
        ("student", {}),
        ("student", {"num_steps": 2, "guidance_scale": 2.0}),
    ],
)
def test_evaluations_are_what_xla_counts(phase, fields):
    counted, stated = scores.evaluations(DiffInstruct, phase, **fields)
    assert counted == pytest.approx(stated, rel=0.1)


def test_phases_take_turns():
    assert [make(aux_steps=2).phase(k) for k in range(6)] == [
        *("aux", "aux", "student") * 2
    ]
    assert set(make().phases) == {"aux", "student"}
