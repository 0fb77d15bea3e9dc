"""Reflow where the best student is known: pairs of gaussians, joined in many ways."""

import dataclasses
import math

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.distillation.reflow import Reflow, straight_time
from diffusionlab.objectives import weightings
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers import grids
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.discrete_beta import DiscreteBeta
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.variance_exploding import VarianceExploding
from diffusionlab.types import DataSpec, Inputs, Network, Prediction, Teacher

C, MU = 0.5, 0.3
SCHEDULES = [Cosine(), Flow(), VarianceExploding(), DiscreteBeta()]
TEACHER = Teacher(lambda *_: None, has_null_label=False)
# x = a eps + b n, n independent: a teacher's own pairs have b = 0.
SOME = (0.3, 0.4)


def objective(schedule=None, prediction="v", network=None, **fields):
    schedule = schedule or Cosine()
    fields = {"sampler": Ddim(num_steps=4), "teacher": TEACHER, **fields}
    return Reflow(
        process=Gaussian(schedule=schedule, prediction=prediction),
        networks={"denoiser": network},
        spec=DataSpec((1,)),
        **fields,
    )


def answering(process, predict):
    """A network that predicts (x, eps) = predict(params, z, t)."""

    def apply(params, z, cond, *, train=False, key=None):
        return process.target(*predict(params, z, cond["t"]), cond["t"])

    return Network(lambda key: {}, apply, ())


def with_student(made, predict):
    network = answering(made.process, predict)
    return dataclasses.replace(made, networks={"denoiser": network})


def quadrature(monkeypatch, coupling, number=1024):
    """A batch with the exact second moments of x = a eps + b n, at each of many tau."""
    a, b = coupling
    rows = [(eps, a * eps + b * n) for eps in (-1, 1) for n in (-1, 1)]
    eps, x = (np.tile(np.float32(q), number)[:, None] for q in zip(*rows, strict=True))
    u = np.repeat((np.arange(number, dtype=np.float32) + 0.5) / number, 4)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.asarray(u))
    return {"x": jnp.asarray(x), "noise": jnp.asarray(eps)}


def run(made, params, batch):
    inputs = Inputs(batch, jax.random.key(0), jnp.int32(0), {}, {})
    return made.phases["train"].loss({"student": params}, inputs)


def value(metrics, name="straightness"):
    total, count = metrics[name]
    return float(total / count)


def best(process, t, coupling):
    """E[x | z] / z and E[eps | z] / z of jointly gaussian pairs."""
    a, b = coupling
    alpha, sigma = process.schedule.alpha_sigma(t)
    variance = alpha**2 * (a**2 + b**2) + 2 * alpha * sigma * a + sigma**2
    return (alpha * (a**2 + b**2) + sigma * a) / variance, (
        alpha * a + sigma
    ) / variance


def linear(process, coupling):
    def predict(params, z, t):
        t = jnp.broadcast_to(t, z.shape[:1])
        x, eps = best(process, t, coupling)
        return Prediction(x[:, None] * z, eps[:, None] * z)

    return predict


def least(coupling, low, high):
    """The least of equation 2: the mean over tau of Var[eps - x | z], in float64."""
    a, b = coupling
    tau = low + (high - low) * (np.arange(20_000) + 0.5) / 20_000
    square = a**2 + b**2
    total = (1 - tau) ** 2 * square + 2 * tau * (1 - tau) * a + tau**2
    shared = tau - (1 - tau) * square + (1 - 2 * tau) * a
    return float(np.mean(1 + square - 2 * a - shared**2 / total))


def ends(schedule):
    return (float(jax.nn.sigmoid(-0.5 * schedule.logsnr(t))) for t in (0.0, 1.0))


@pytest.mark.parametrize(("schedule", "prediction"), [(Cosine(), "v"), (Flow(), "x")])
def test_independent_pairs_are_as_bent_as_the_integral_says(
    schedule, prediction, monkeypatch
):
    made = objective(schedule, prediction)
    made = with_student(made, linear(made.process, (0.0, C)))
    batch = quadrature(monkeypatch, (0.0, C))
    loss, metrics = jax.jit(lambda b: run(made, {}, b))(batch)
    low, high = ends(schedule)
    # Var[eps - x | z] = c² / ((1 - tau)² c² + tau²), of which arctan is the integral.
    angle = math.atan(high / (1 - high) / C) - math.atan(low / (1 - low) / C)
    expected = C * angle / (high - low)
    # By the rule of midpoints, of 1024 of them; the x-prediction of tau = 5e-4 is
    # read with an error of 1e-7 / tau².
    assert value(metrics) == pytest.approx(expected, rel=2e-3)
    assert float(loss) == pytest.approx(value(metrics, "loss"), rel=1e-6)
    by_level, count = metrics["loss_by_logsnr"]
    assert float(by_level.sum()) == pytest.approx(float(metrics["loss"][0]), rel=1e-4)
    assert count.shape == (10,) and count.sum() == len(batch["x"])


def test_the_best_student_is_the_conditional_mean(monkeypatch):
    process = Gaussian(schedule=Cosine(), prediction="x")
    number = 64
    batch = quadrature(monkeypatch, SOME, number)
    place = jnp.repeat(jnp.arange(number), 4)

    def apply(params, z, cond, *, train=False, key=None):
        return params["slope"][place][:, None] * z

    made = objective(prediction="x", network=Network(lambda key: {}, apply, ()))
    u = (jnp.arange(number) + 0.5) / number
    t = straight_time(process.schedule, u)
    slope, _ = best(process, t, SOME)

    @jax.jit
    def gradient(slope):
        return jax.grad(lambda s: run(made, {"slope": s}, batch)[0])(slope)

    at, off = gradient(slope), gradient(slope + 1e-2)
    assert np.all(np.abs(at) < 1e-3 * np.abs(off))
    _, metrics = jax.jit(lambda s: run(made, {"slope": s}, batch))(slope)
    assert value(metrics) == pytest.approx(least(SOME, *ends(Cosine())), rel=1e-2)


def test_reflow_makes_paths_straighter():
    """Independent pairs, some that hold together, and the pairs of a teacher."""
    low, high = ends(Cosine())
    bent = [least(pair, low, high) for pair in ((0.0, C), SOME, (C, 0.0))]
    assert bent[0] > bent[1] > 0.1 and bent[2] < 1e-12


def test_what_the_teacher_says_of_its_own_pairs_is_not_yet_straight(monkeypatch):
    made = objective()
    batch = quadrature(monkeypatch, (C, 0.0))
    found = []
    for coupling in ((0.0, C), (C, 0.0)):
        student = with_student(made, linear(made.process, coupling))
        found.append(value(jax.jit(lambda b, s=student: run(s, {}, b))(batch)[1]))
    tau = sum(ends(Cosine())) / 2 + (np.arange(4000) + 0.5) / 4000 - 0.5
    says = (tau - (1 - tau) * C**2) / ((1 - tau) ** 2 * C**2 + tau**2)
    expected = np.mean((1 - C - says * ((1 - tau) * C + tau)) ** 2)
    assert found[0] == pytest.approx(expected, rel=1e-2)
    assert expected > 0.02 and found[1] < 1e-9


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("schedule", [Cosine(), Flow()])
def test_monotone_pairs_are_exact_in_one_step(schedule, num_steps, monkeypatch):
    """x = mu + c eps: no paths cross, and every number of steps gives the same."""
    made = objective(schedule)

    def predict(params, z, t):
        t = jnp.broadcast_to(t, z.shape[:1])
        alpha, sigma = (q[:, None] for q in schedule.alpha_sigma(t))
        eps = (z - alpha * MU) / (alpha * C + sigma)
        return Prediction(MU + C * eps, eps)

    made = with_student(made, predict)
    batch = quadrature(monkeypatch, (C, 0.0), 64)
    batch["x"] = batch["x"] + MU
    assert value(run(made, {}, batch)[1]) < 1e-9
    eps = jnp.linspace(-3, 3, 7)[:, None]
    found = samplers.sample(
        Ddim(num_steps=num_steps, grid=grids.Straight()),
        made.process,
        lambda z, t: made.predict({"student": {}}, z, t, {}),
        jax.random.split(jax.random.key(0), 7),
        (1,),
        eps,
    )
    # The sampler starts from eps, not from the mixture of eps and a little of x.
    alpha = float(schedule.alpha_sigma(1.0)[0])
    np.testing.assert_allclose(found, MU + C * eps, atol=3 * alpha + 1e-5)


def test_samples_keep_the_law_of_the_data():
    """Theorem 3.3: the flow of E[eps - x | z] has the marginals of the pairs."""
    process = Gaussian(schedule=Cosine(), prediction="v")
    predict, eps = linear(process, SOME), jnp.ones((1, 1))
    errors = []
    for num_steps in (32, 64, 128):
        sampler = Ddim(num_steps=num_steps, grid=grids.Straight())
        keys = jax.random.split(jax.random.key(0), 1)
        found = samplers.sample(
            sampler, process, lambda z, t: predict({}, z, t), keys, (1,), eps
        )
        errors.append(abs(float(found[0, 0]) - math.hypot(*SOME)))
    assert errors[-1] < 0.01
    # Euler's method is of first order.
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_straight_grid_has_equal_steps_of_tau(schedule):
    t = np.asarray(grids.Straight()(schedule, 8))
    assert t[0] == 1.0 and t[-1] == 0.0
    inner = grids.tau(schedule, t[1:-1])
    np.testing.assert_allclose(inner, np.arange(7, 0, -1) / 8, rtol=1e-4)
    u = np.linspace(0.05, 0.95, 5, dtype=np.float32)
    low, high = ends(schedule)
    found = grids.tau(schedule, straight_time(schedule, u))
    np.testing.assert_allclose(found, low + u * (high - low), rtol=1e-4)


@pytest.mark.parametrize("schedule", [Cosine(), Edm(preserving=False)])
def test_ddim_is_eulers_method_for_the_straight_flow(schedule):
    process = Gaussian(schedule=schedule, prediction="v")
    t, s = (straight_time(schedule, jnp.float32(u)) for u in (0.7, 0.4))
    z_t, x = jnp.float32([[0.8]]), jnp.float32([[0.3]])
    at_t, at_s = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    eps = (z_t - at_t[0] * x) / at_t[1]
    state = Ddim(num_steps=1).step(
        process, lambda *_: Prediction(x, eps), samplers.State(z_t, x), t, s, None
    )
    step = grids.tau(schedule, s) - grids.tau(schedule, t)
    euler = z_t / sum(at_t) + step * (eps - x)
    np.testing.assert_allclose(state.z / sum(at_s), euler, rtol=1e-5)


def test_a_weighting_takes_the_place_of_the_flows(monkeypatch):
    batch = quadrature(monkeypatch, (0.0, C), 64)
    weighted = objective(weighting=weightings.Eps())
    weighted = with_student(weighted, linear(weighted.process, (0.0, C)))
    _, metrics = run(weighted, {}, batch)
    t = straight_time(Cosine(), jax.random.uniform(None, ()))
    alpha, sigma = Cosine().alpha_sigma(t)
    error = alpha**2 * C**2 / (alpha**2 * C**2 + sigma**2)  # Var[eps | z]
    assert value(metrics, "loss") == pytest.approx(float(error.mean()), rel=1e-4)
    assert value(metrics) == pytest.approx(least((0.0, C), *ends(Cosine())), rel=2e-2)


def test_one_step_is_learned_as_a_map():
    apply = lambda params, z, cond, train=False, key=None: params["a"] * z  # noqa: E731
    network = Network(lambda key: {}, apply, ())
    made = objective(prediction="x", network=network, mode="distil")
    eps = jnp.float32([[-1.0], [0.5], [2.0]])
    batch = {"x": MU + C * eps, "noise": eps}
    params = {"a": jnp.float32(0.2)}
    (_, metrics), grad = jax.value_and_grad(
        lambda p: run(made, p, batch), has_aux=True
    )(params)
    residual = 0.2 * eps - batch["x"]
    assert value(metrics, "loss") == pytest.approx(float((residual**2).mean()))
    assert float(grad["a"]) == pytest.approx(float((2 * residual * eps).mean()))
    assert value(metrics, "std_ratio") == pytest.approx(0.2 / C)


@pytest.mark.parametrize("mode", ["reflow", "distil"])
def test_a_step_costs_what_it_says(mode):
    net = costs.wide()
    made = objective(network=net, mode=mode)
    params, one = net.init(jax.random.key(0)), jnp.ones((2, 1))
    gradient = jax.grad(lambda p, b: run(made, p, b)[0])
    whole = costs.flops(gradient, params, {"x": one, "noise": one})
    forward = costs.flops(lambda p, z: net.apply(p, z, {}), params, one)
    assert whole / forward == pytest.approx(made.evaluations["train"], rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "config.teacher: missing"),
        ({"guidance_scale": 2.0}, "guidance_scale: 2.0 needs a teacher"),
        ({"num_pairs": 0}, "num_pairs: must be at least 1"),
        ({"mode": "distill"}, "mode: expected reflow or distil, got 'distill'"),
        ({"mode": "distil", "num_steps": 2}, "num_steps: mode 'distil' learns one"),
        ({"mode": "distil", "weighting": weightings.Eps()}, "weighting: mode 'distil'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        objective(**fields)


def test_a_sampler_with_other_steps_is_refused():
    with pytest.raises(ValueError, match="^num_steps: is 3, but .* trains 2"):
        objective(num_steps=2).check_sampler(Ddim(num_steps=3))
