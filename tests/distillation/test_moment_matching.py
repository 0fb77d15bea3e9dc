"""Moment matching: its step, its times, where gradients flow, cost and errors."""

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from moments import (
    PROCESS,
    draws,
    replace_noise,
    replace_times,
    slope,
    tanh,
)

from diffusionlab.distillation import moment_matching
from diffusionlab.distillation.moment_matching import MomentMatching
from diffusionlab.objectives import weightings
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers import grids
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.types import DataSpec, Prediction, Teacher


def make(c=0.5, network=None, **fields):
    fields = {
        "process": PROCESS,
        "networks": {"denoiser": network or toys.linear()},
        "spec": toys.SPEC,
        "teacher": toys.teacher(c),
        "weighting": weightings.V(),
        **fields,
    }
    return MomentMatching(**fields)


class Ends:
    """alpha² = 1 - t: logsnr is infinite at both ends."""

    def alpha_sigma(self, t):
        return jnp.sqrt(1 - t), jnp.sqrt(t)

    def logsnr(self, t):
        return jnp.log1p(-t) - jnp.log(t)


def test_a_step_from_pure_noise_and_to_clean_data():
    process = Gaussian(schedule=Ends(), prediction="x")
    x, eps, n = (jnp.full((3, 1), q) for q in (2.0, 5.0, 7.0))
    t, s = jnp.float32([1, 0.5, 1]), jnp.float32([0.25, 0, 0])
    z_s = moment_matching.step(process, Prediction(x, eps), n, t, s)
    np.testing.assert_allclose(z_s[0, 0], np.sqrt(0.75) * 2 + 0.5 * 7, rtol=1e-6)
    np.testing.assert_array_equal(z_s[1:, 0], [2, 2])


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_a_step_is_the_samplers(rho):
    keys = jax.random.split(jax.random.key(1), 4)
    z = jax.random.normal(jax.random.key(2), (4, 3))
    predict = lambda z, t: Prediction(0.3 * z, 0.9 * z)  # noqa: E731
    t, s = jnp.float32(0.8), jnp.float32(0.1)
    noise = samplers.normal(keys, (3,))
    full = jnp.full(4, t), jnp.full(4, s)
    ours = moment_matching.step(PROCESS, predict(z, t), noise, *full, rho)
    state = samplers.State(z, z)
    theirs = Ddim(num_steps=2, eta=rho).step(PROCESS, predict, state, t, s, keys)
    np.testing.assert_allclose(ours, theirs.z, atol=1e-6)
    if rho == 1:
        alpha, sigma = PROCESS.schedule.alpha_sigma(t)
        predict = lambda z, t: Prediction(  # noqa: E731
            (z - sigma * 0.9 * z) / alpha, 0.9 * z
        )
        ours = moment_matching.step(PROCESS, predict(z, t), noise, *full)
        ancestral = Ancestral(num_steps=2, noise_exponent=0.0)
        theirs = ancestral.step(PROCESS, predict, state, t, s, keys)
        np.testing.assert_allclose(ours, theirs.z, atol=1e-5)


# Items 7 and 9.
def test_students_first_gradient_is_exactly_zero():
    network, teacher, start = tanh()
    x = jax.random.normal(jax.random.key(0), (16, 1))
    inputs = toys.inputs(
        x, params={"student": start, "aux": start, "teacher": {"student": start}}
    )
    objective = make(network=network, teacher=teacher)
    grads, metrics = jax.grad(objective.student_loss, has_aux=True)(
        {"student": start}, inputs
    )
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))
    assert metrics["loss"][0] == 0
    both = jax.grad(objective.aux_loss, has_aux=True)({"aux": start}, inputs)[0]
    alone = make(network=network, teacher=teacher, average_targets=False)
    first = jax.grad(alone.aux_loss, has_aux=True)({"aux": start}, inputs)[0]
    assert abs(first["aux"]["out"]) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, both, first)


def test_gradient_flows_through_the_students_samples_alone():
    network, teacher, start = tanh()
    other = {"in": jnp.float32(0.7), "out": jnp.float32(0.6)}
    x = jax.random.normal(jax.random.key(0), (16, 1))
    params = {"student": start, "aux": other, "teacher": {"student": start}}
    inputs = toys.inputs(x, params=params)
    objective = make(network=network, teacher=teacher)

    def loss(trained, params):
        return objective.student_loss(trained, inputs._replace(params=params))[0]

    found, others = jax.grad(loss, (0, 1))({"student": start}, params)
    assert all(np.all(g == 0) for g in jax.tree.leaves(others))
    draw = lambda p: moment_matching.draw(objective, p, inputs.batch, inputs.key)  # noqa: E731
    made = draw(start)
    gap = network.apply(other, made.z_s, {}) - network.apply(start, made.z_s, {})
    _, pull = jax.vjp(lambda p: draw(p).x, start)
    (expected,) = pull(made.weight[:, None] * gap / len(x))
    snr = np.exp(PROCESS.schedule.logsnr(made.s))
    np.testing.assert_allclose(made.weight, snr + 1, rtol=1e-4)
    for name in start:
        np.testing.assert_allclose(found["student"][name], expected[name], rtol=1e-5)

    def aux_loss(trained, params):
        return objective.aux_loss(trained, inputs._replace(params=params))[0]

    others = jax.grad(aux_loss, 1)({"aux": other}, params)
    assert all(np.all(g == 0) for g in jax.tree.leaves(others))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_times_are_a_step_of_the_sampler_apart(k):
    for grid in (None, grids.Shifted(shift=3.0)):
        objective = make(num_steps=k, times_option="grid", grid=grid)
        t, s = moment_matching.times(objective, jax.random.key(0), 999)
        stops = moment_matching.stops(objective)
        assert np.all(s < t) and np.all(s > 0)
        nearest = np.abs(t[:, None] - stops[:-1]).argmin(1)
        np.testing.assert_allclose(t, stops[nearest], atol=1e-6)
        assert np.all(s >= stops[nearest + 1] - 1e-6)
        assert len(set(nearest)) == k
    t, s = moment_matching.times(make(num_steps=k), jax.random.key(0), 4096)
    assert np.all(t >= s) and np.all(t - s < 1 / k + 1e-6) and np.max(t) == 1
    # min(s + u / k, 1) is 1 in half of the draws of k = 1.
    np.testing.assert_allclose(np.mean(t == 1), 1 / (2 * k), atol=0.02)


def test_independent_noise_is_the_posterior_only_from_pure_noise(monkeypatch):
    x, noise = draws(0.5)
    for t, same in ((1.0, True), (0.6, False)):
        replace_noise(monkeypatch, noise)
        replace_times(monkeypatch, t, 0.4)
        z = [
            moment_matching.draw(
                make(0.5, renoising=word),
                slope(0.4),
                {"x": x},
                jax.random.key(0),
            ).z_s
            for word in ("posterior", "independent")
        ]
        assert np.allclose(*z, atol=2e-3) == same


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("phase", ["aux", "student"])
def test_cost_of_a_step(phase, scale):
    network = costs.wide()

    def teach(params, z, t, cond):
        return Prediction(network.apply(params, z, cond), z)

    objective = make(
        network=network,
        teacher=Teacher(teach, True),
        spec=DataSpec((costs.SIZE,), num_classes=2),
        guidance_scale=scale,
    )
    params = {r: network.init(jax.random.key(0)) for r in ("student", "aux", "teacher")}
    inputs = toys.inputs(jnp.ones((32, costs.SIZE)), params=params)
    inputs = inputs._replace(batch={**inputs.batch, "label": jnp.zeros(32, jnp.int32)})
    found = costs.network_evaluations(objective, phase, inputs)
    np.testing.assert_allclose(found, objective.evaluations[phase], rtol=0.1)


def test_phases_are_in_turns_and_the_teacher_starts_them():
    objective = make(aux_steps=2)
    assert [objective.phase(i) for i in range(4)] == ["aux", "aux", "student", "aux"]
    assert {r.init for r in objective.roles.values()} == {"teacher"}
    assert objective.phases["aux"].trains == ("aux",)
    assert objective.phases["student"].trains == ("student",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher": None}, "config.teacher"),
        ({"num_steps": 0}, "num_steps"),
        ({"aux_steps": 0}, "aux_steps"),
        ({"times_option": "even"}, "times_option: expected continuous or grid"),
        ({"renoising": "none"}, "renoising: expected posterior or independent"),
        ({"posterior_noise": 0.0}, "posterior_noise"),
        ({"posterior_noise": 1.5}, "posterior_noise"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"weighting": weightings.Edm(sigma_data=0.5)}, "weighting.sigma_data"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, said):
    with pytest.raises(ValueError, match=said):
        make(**fields)


def test_sampler_has_to_make_the_steps_that_were_trained():
    right = Ancestral(num_steps=4, noise_exponent=0.0)
    fields = {"num_steps": 4}
    make(**fields).check_sampler(right)
    make(**fields).check_sampler(Ddim(num_steps=4, eta=1.0))
    make(**fields, posterior_noise=0.5).check_sampler(Ddim(num_steps=4, eta=0.5))
    independent = make(**fields, renoising="independent")
    independent.check_sampler(Consistency(num_steps=4))
    make(num_steps=1).check_sampler(Ddim(num_steps=1))
    for objective, sampler, said in (
        (make(**fields), Ancestral(num_steps=5, noise_exponent=0.0), "num_steps"),
        (make(**fields), Ancestral(num_steps=4), "noise_exponent 0"),
        (make(**fields), Ddim(num_steps=4), "eta"),
        (make(**fields, posterior_noise=0.5), right, "posterior_noise = 0.5"),
        (independent, right, "consistency"),
        (make(**fields, grid=grids.Shifted(shift=2.0)), right, "grid"),
    ):
        with pytest.raises(ValueError, match=said):
            objective.check_sampler(sampler)
