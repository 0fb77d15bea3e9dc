"""BOOT: the exact signal, the loss at it, the boundary, the cost."""

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffusionlab.distillation import boot as lib
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import grids
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules import times
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Network, Prediction, Teacher

C = 0.5
# Finite at both ends, and as good as not truncated.
PROCESS = Gaussian(schedule=Cosine(logsnr_min=-30.0, logsnr_max=30.0), prediction="x")


def told(function):
    """A student y = a function(eps, t), t being what it is told."""

    def apply(params, z, cond, *, train=False, key=None):
        t = PROCESS.schedule.inverse(cond["target_logsnr"])[:, None]
        return params["a"] * function(z, t)

    return Network(lambda key: {"a": jnp.float32(1)}, apply, ())


def exact(eps, t):
    """(sqrt(V_t) - sigma_t) / alpha_t eps without its difference of two near 1."""
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    return alpha * C**2 / (jnp.sqrt(toys.variance(t, C)) + sigma) * eps


def make(function=exact, **fields):
    own = dict(process=PROCESS, spec=toys.SPEC, teacher=toys.teacher(C))
    own["networks"] = {"denoiser": told(function)}
    return lib.Boot(**{**own, **fields})


def at(t, time_step, monkeypatch):
    """Makes every t the given one."""
    u = (t - time_step) / (1 - time_step)

    def quantiles(key, size, stratified):
        return jnp.full(size, u)

    monkeypatch.setattr(times, "quantiles", quantiles)


def test_the_exact_signal():
    t = jnp.array([0.25, 0.5, 0.75])
    found = exact(1.0, t)
    np.testing.assert_allclose(found, [0.235073, 0.118034, 0.051233], atol=1e-6)
    np.testing.assert_allclose(exact(1.0, 0.0), C, rtol=1e-6)
    # It is the signal of the point that the flow is at: std sqrt(V_t).
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    np.testing.assert_allclose(
        alpha * found + sigma, jnp.sqrt(toys.variance(t, C)), rtol=1e-6
    )


@pytest.mark.parametrize(
    "step, root", [(0.1, 3.12e-2), (0.01, 2.84e-3), (0.001, 2.81e-4)]
)
def test_the_loss_at_the_exact_signal_vanishes_with_the_step(step, root, monkeypatch):
    at(0.5, step, monkeypatch)
    objective = make(time_step=step, boundary_weight=0.0)
    inputs = toys.inputs(jnp.zeros((8, 1)), params={"student": {"a": jnp.float32(1)}})
    loss, _ = objective.loss({"student": {"a": jnp.float32(1)}}, inputs)
    eps = jax.random.normal(lib.base.split(inputs.key, 3)[1], (8, 1))
    per_eps = jnp.sqrt(loss / jnp.mean(eps**2))
    # Three digits are given; y is rounded at 1e-8, over l = 0.003 that is 1e-5.
    np.testing.assert_allclose(per_eps, root, rtol=2e-3, atol=2e-5 * (step < 0.01))


def test_the_last_step_ends_at_what_the_teacher_predicts():
    y, x_hat = jnp.array([[0.2]]), jnp.array([[0.5]])
    t, s = jnp.array([0.5]), jnp.array([0.0])
    found, step = lib.signal_step(PROCESS, y, x_hat, t, s)
    np.testing.assert_allclose(found, x_hat, rtol=1e-6)
    np.testing.assert_allclose(step, 1, rtol=1e-6)
    s = jnp.array([0.25])
    ratio = float(np.tan(np.pi / 8))
    found, step = lib.signal_step(PROCESS, y, x_hat, t, s)
    np.testing.assert_allclose(step, 1 - ratio, rtol=1e-5)
    np.testing.assert_allclose(found, 0.2 + (1 - ratio) * 0.3, rtol=1e-5)


def test_gradients_flow_through_the_student_at_s_and_at_one_alone(monkeypatch):
    at(0.5, 0.1, monkeypatch)

    def predict(params, z, t, cond):
        return Prediction(*(params["k"] * q for q in toys.exact(z, t, C)))

    def signal(eps, t):
        return exact(eps, t) + 0.3 * eps  # the exact one vanishes at t = 1

    objective = make(
        signal, time_step=0.1, boundary_weight=0.5, teacher=Teacher(predict, False)
    )
    frozen = {"student": {"a": jnp.float32(0.8)}, "teacher": {"k": jnp.float32(0.9)}}

    def loss(a, frozen):
        inputs = toys.inputs(jnp.zeros((4, 1)), params=frozen)
        return objective.loss({"student": {"a": a}}, inputs)[0]

    slope, others = jax.grad(loss, argnums=(0, 1))(jnp.float32(0.7), frozen)
    assert not any(map(np.any, jax.tree.leaves(others)))
    key = lib.base.split(toys.inputs(jnp.zeros(1)).key, 3)[1]
    square = float(jnp.mean(jax.random.normal(key, (4, 1)) ** 2))
    alpha, sigma = PROCESS.schedule.alpha_sigma(0.5)
    y_t = 0.8 * signal(1.0, 0.5)
    x_hat = 0.9 * alpha * C**2 / toys.variance(0.5, C) * (alpha * y_t + sigma)
    step = 1 - np.tan(np.pi / 5)
    target, y_s, y_1 = y_t + step * (x_hat - y_t), signal(1.0, 0.4), signal(1.0, 1.0)
    first = 0.9 * toys.exact(jnp.ones((1, 1)), jnp.ones(1), C).x[0, 0]
    said = 2 * (0.7 * y_s - target) * y_s / step**2 + (0.7 * y_1 - first) * y_1
    np.testing.assert_allclose(slope, square * said, rtol=1e-4)


def test_a_student_that_starts_as_its_teacher_holds_the_boundary():
    process = Gaussian(schedule=Cosine(), prediction="v")

    def apply(params, z, cond, *, train=False, key=None):
        told = cond["target_logsnr"] if "target_logsnr" in cond else cond["logsnr"]
        return jnp.tanh(z) * params["a"] + params["b"] * told[:, None]

    net = Network(lambda key: {"a": 1.0, "b": 0.0}, apply, ())
    params = {"a": jnp.float32(0.3), "b": jnp.float32(0.0)}

    def predict(p, z, t, cond):
        return process.predict(
            apply(p, z, {"logsnr": process.schedule.logsnr(t)}), z, t
        )

    objective = make(
        process=process, networks={"denoiser": net}, teacher=Teacher(predict, False)
    )
    inputs = toys.inputs(
        jnp.zeros((4, 1)), params={"student": params, "teacher": params}
    )
    _, metrics = objective.loss({"student": params}, inputs)
    np.testing.assert_allclose(metrics["boundary"][0], 0, atol=1e-10)


def test_sampling_asks_for_the_clean_end_of_the_path():
    objective, eps = make(), jnp.array([[0.7], [-1.2]])
    params = {"student": {"a": jnp.float32(1)}}
    for t in (1.0, 0.3):
        found = objective.predict(params, eps, jnp.float32(t), {})
        np.testing.assert_allclose(found.x, C * eps, rtol=1e-6)
    objective = make(process=Gaussian(schedule=Cosine(), prediction="x"))
    objective.check_sampler(Ddim(num_steps=1))
    with pytest.raises(ValueError, match="num_steps: BOOT makes 1 step, not 2"):
        objective.check_sampler(Ddim(num_steps=2))
    with pytest.raises(ValueError, match="grid: BOOT starts at t = 1"):
        objective.check_sampler(Ddim(num_steps=1, grid=grids.Rho()))


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(time_step=0.0), r"time_step: must be in \(0, 1\], got 0.0"),
        (dict(boundary_weight=-1.0), "boundary_weight: must be at least 0"),
        (dict(teacher=None), "config.teacher: missing"),
        (dict(networks={"denoiser": toys.linear()}), "told 'target_logsnr', and its"),
    ],
)
def test_what_cannot_be_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        make(**fields)


def test_the_average_named_is_what_answers_at_t():
    ema = {"slow": {"student": {"a": jnp.float32(3.0)}}}
    student = {"student": {"a": jnp.float32(1.0)}}
    inputs = toys.inputs(jnp.zeros((8, 1)), params=student, ema=ema)
    assert make(target_ema="slow").loss(student, inputs)[0] > 1
    with pytest.raises(ValueError, match="target_ema: there is no average 'fast'"):
        make(target_ema="fast").loss(student, inputs)


def test_the_cost_of_a_step():
    net = costs.wide()

    def apply(params, z, cond, *, train=False, key=None):
        return net.apply(
            params, z + (1e-3 * cond["target_logsnr"][:, None] if cond else 0), cond
        )

    both = Network(net.init, apply, ())
    params = net.init(jax.random.key(0))
    process = Gaussian(schedule=Cosine(), prediction="v")

    def teacher(p, z, t, cond):
        return process.predict(net.apply(p, z, cond), z, t)

    objective = make(
        process=process,
        spec=DataSpec((costs.SIZE,)),
        networks={"denoiser": both},
        teacher=Teacher(teacher, False),
    )
    x = jnp.ones((8, costs.SIZE))
    inputs = toys.inputs(x, params={"student": params, "teacher": params})
    found = costs.network_evaluations(objective, "train", inputs)
    assert objective.evaluations == {"train": 9}
    np.testing.assert_allclose(found, 9, rtol=0.1)
