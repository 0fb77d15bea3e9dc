"""Consistency models in discrete time: orders, boundary, gradients, cost."""

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffusionlab.distillation import consistency as lib
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.samplers import grids
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Network, Prediction, Teacher, lift

C = 0.5
UNIFORM = grids.Uniform()
PROCESS = Gaussian(schedule=Cosine(), prediction="x")


def exact(z_t, t):
    """E[x | z_t] and E[eps | z_t] of N(0, C² I) data."""
    alpha, sigma = (lift(q, z_t.ndim) for q in PROCESS.schedule.alpha_sigma(t))
    v = alpha**2 * C**2 + sigma**2
    return Prediction(alpha * C**2 / v * z_t, sigma / v * z_t)


TEACHER = Teacher(lambda params, z, t, cond: exact(z, t), has_null_label=False)


def make(kind=lib.ConsistencyDistillation, network=None, **fields):
    fields = {"process": PROCESS, "spec": toys.SPEC, "grid": UNIFORM, **fields}
    fields.setdefault("teacher", TEACHER)
    return kind(networks={"denoiser": network or toys.linear()}, **fields)


def cubic():
    """A student x_hat = a z + b z³."""

    def apply(params, z, cond, *, train=False, key=None):
        return params["a"] * z + params["b"] * z**3

    return Network(lambda key: {"a": 0.6, "b": 0.1}, apply, ())


def f_star(z, t):
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    return C * z / jnp.sqrt(alpha**2 * C**2 + sigma**2)


@pytest.mark.parametrize("solver, ratio", [("ddim", 4), ("heun", 8)])
def test_the_residual_at_the_exact_function_has_the_order_of_the_solver(solver, ratio):
    objective = make(solver=solver)
    steps = jnp.array([0.08, 0.04, 0.02])
    t = jnp.full(3, 0.6)
    z_t = jnp.ones((3, 1))
    z_s = lib.teacher_step(objective, {}, z_t, t, t - steps, {})
    residual = f_star(1.0, t) - f_star(z_s[:, 0], t - steps)
    found = residual[:-1] / residual[1:]
    # The next order of the step adds a part proportional to it: half as much each time.
    np.testing.assert_allclose(found, ratio, rtol=0.12)
    np.testing.assert_allclose(2 * found[1] - found[0], ratio, rtol=0.02)


def test_a_step_to_zero_ends_at_the_clean_data_of_the_teacher():
    z_t, t = jnp.ones((1, 1)), jnp.array([0.3])
    for solver in ("ddim", "heun"):
        found = lib.teacher_step(make(solver=solver), {}, z_t, t, 0 * t, {})
        np.testing.assert_allclose(found, exact(z_t, t).x, rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_boundary_is_exact_for_every_prediction(prediction):
    process = Gaussian(schedule=Cosine(), prediction=prediction, sigma_data=0.5)
    z, raw = jnp.array([[0.7, -2.0]]), jnp.array([[3.0, 1.0]])
    t = jnp.zeros(1)
    found = lib.with_boundary(process, process.predict(raw, z, t), z, t)
    alpha, _ = process.schedule.alpha_sigma(t)
    np.testing.assert_array_equal(found.x, z / alpha)
    np.testing.assert_allclose(found.eps, 0.0, atol=1e-6)


def test_the_skip_is_that_of_edm():
    process = Gaussian(schedule=Cosine(logsnr_max=6.0), prediction="edm", sigma_data=C)
    t = jnp.array([1e-4, 0.01, 0.2, 0.6, 0.95, 1.0])
    z, raw = jnp.linspace(-2, 2, 6)[:, None], jnp.linspace(1, 2, 6)[:, None]
    found = lib.with_boundary(process, process.predict(raw, z, t), z, t)
    alpha, sigma = (lift(q, 2) for q in process.schedule.alpha_sigma(t))
    s, least = sigma / alpha, np.exp(-3.0)
    skip = C**2 / ((s - least) ** 2 + C**2)
    out = C * (s - least) / jnp.sqrt(C**2 + s**2)
    np.testing.assert_allclose(found.x, skip * z / alpha + out * raw, rtol=2e-4)
    again = process.mix(found.x, found.eps, t)
    np.testing.assert_allclose(again, z, rtol=1e-5, atol=1e-5)


def test_gradients_of_training_and_distillation_meet_as_the_step_shrinks():
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    x, eps = (jnp.asarray(q.ravel(), jnp.float32) for q in np.meshgrid(nodes, nodes))
    share = np.outer(weights, weights).ravel() / weights.sum() ** 2
    objective = make(network=cubic(), solver="ddim")
    params = {"a": jnp.float32(0.6), "b": jnp.float32(0.1)}

    @jax.jit
    def gradient(x, eps, step):
        t, x, eps = jnp.full(1, 0.5), x[None, None] * C, eps[None, None]
        z_t, s = PROCESS.mix(x, eps, t), t - step
        told = lib.teacher_step(objective, {}, z_t, t, s, {})
        inputs = toys.inputs(x, params={"student": params})
        return [
            jax.grad(lambda p, z_s=z_s: lib.matched(
                objective, p, inputs, (z_t, t, z_s, s), {}, None
            )[0])(params)["b"]
            for z_s in (told, PROCESS.mix(x, eps, s))
        ]  # fmt: skip

    apart = []
    for step in (0.02, 0.01):
        each = jax.vmap(gradient, (0, 0, None))(x, eps, step)
        taught, trained = (float(share @ np.asarray(q)) for q in each)
        apart.append(abs(taught - trained) / abs(taught))
    assert apart[0] < 0.05
    np.testing.assert_allclose(apart[0] / apart[1], 2, rtol=0.1)


def test_the_distances_and_the_weight():
    u = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(lib.distance(make(), u), [12.5, 0])
    huber = lib.distance(make(huber_scale=0.00054), jnp.ones((1, 3072)))
    width = 0.00054 * 3072**0.5
    assert abs(width - 0.03) < 1e-4
    np.testing.assert_allclose(huber, np.sqrt(3072 + width**2) - width, rtol=1e-6)
    slope = jax.grad(lambda u: lib.distance(make(huber_scale=0.1), u).sum())(u)
    np.testing.assert_allclose(slope[1], 0.0)


def test_the_loss_is_the_weighted_distance_and_its_target_has_no_gradient():
    x, z_t = jnp.full((1, 1), 0.4), jnp.full((1, 1), 1.2)
    t, s, z_s = jnp.array([0.5]), jnp.array([0.4]), jnp.full((1, 1), 1.1)
    objective = make(gap_weight=True)
    inputs = toys.inputs(x, params={"student": {"a": jnp.float32(0.3)}})

    def loss(a):
        pair = z_t, t, z_s, s
        return lib.matched(objective, {"a": a}, inputs, pair, {}, None)[0]

    gap = float(np.tan(np.pi / 4) - np.tan(np.pi / 5))
    np.testing.assert_allclose(loss(0.5), 0.27**2 / gap, rtol=5e-3)
    # The skip of (4) is off x_hat by a share of 1e-3 here.
    np.testing.assert_allclose(jax.grad(loss)(0.5), 2 * 0.27 * 1.2 / gap, rtol=5e-3)


def test_the_target_is_an_average_where_one_is_named():
    x = jnp.ones((4, 1))
    ema = {"slow": {"student": {"a": jnp.float32(2.0)}}}
    student = {"a": jnp.float32(0.5)}
    inputs = toys.inputs(x, params={"student": student}, ema=ema)
    own, averaged = (
        float(make(target_ema=name, num_levels=4).loss({"student": student}, inputs)[0])
        for name in ("", "slow")
    )
    assert averaged > own + 0.1
    with pytest.raises(ValueError, match="target_ema: there is no average 'fast'"):
        make(target_ema="fast").loss({"student": student}, inputs)


def test_no_gradient_reaches_the_teacher_or_the_target():
    def predict(params, z, t, cond):
        return Prediction(*(params["k"] * q for q in exact(z, t)))

    objective = make(teacher=Teacher(predict, False), num_levels=4)
    frozen = {"student": {"a": jnp.float32(0.4)}, "teacher": {"k": jnp.float32(0.9)}}

    def loss(frozen):
        inputs = toys.inputs(jnp.ones((8, 1)), params=frozen)
        return objective.loss({"student": {"a": jnp.float32(0.4)}}, inputs)[0]

    assert not any(map(np.any, jax.tree.leaves(jax.grad(loss)(frozen))))


def test_the_first_stage_of_pairs_by_ratio_is_denoising():
    objective = make(
        lib.ConsistencyTraining, grid=None, pairs="ratio", first_levels=1,
        last_levels=4, curriculum_steps=3, gap_weight=False, huber_scale=0.0,
    )  # fmt: skip
    student = {"student": {"a": jnp.float32(0.0)}}
    for step, denoising in ((0, True), (1, False)):
        inputs = toys.inputs(jnp.full((8, 1), 0.7), step=step, params=student)
        loss, metrics = objective.loss(student, inputs)
        # A student that answers 0 is off by x from the data, by nothing from itself;
        # but for its skip, near the data.
        np.testing.assert_allclose(loss, 0.49 if denoising else 0.0, atol=0.01)
        assert metrics["levels"][0] == (1 if denoising else 2)


def test_samplers_that_take_an_answer_for_a_mean_are_refused():
    objective = make(process=Gaussian(schedule=Cosine(), prediction="v"), grid=None)
    objective.check_sampler(
        Consistency(num_steps=2, grid=grids.From(first_logsnr=-8.76))
    )
    with pytest.raises(ValueError, match="name: Ddim with 2 steps"):
        objective.check_sampler(Ddim(num_steps=2))
    with pytest.raises(ValueError, match=r"grid: starts at t = 1, .*'from'"):
        objective.check_sampler(Consistency(num_steps=2))
    make().check_sampler(Ddim(num_steps=1))


@pytest.mark.parametrize(
    "kind, fields, match",
    [
        (lib.ConsistencyDistillation, dict(solver="rk4"), "solver: expected heun"),
        (lib.ConsistencyDistillation, dict(num_levels=0), "num_levels: must be"),
        (lib.ConsistencyDistillation, dict(teacher=None), "config.teacher: missing"),
        (lib.ConsistencyDistillation, dict(guidance_scale=2.0), "guidance_scale: 2"),
        (lib.ConsistencyTraining, dict(level_std=0.0), "level_std: must be positive"),
        (lib.ConsistencyTraining, dict(pairs="both"), "pairs: expected grid"),
        (lib.ConsistencyTraining, dict(pairs="ratio"), "takes no grid"),
        (lib.ConsistencyTraining, dict(first_levels=0), "first_levels: expected"),
        (lib.ConsistencyTraining, dict(growth=1.0), "growth: must be above 1"),
    ],
)
def test_what_cannot_be_is_refused(kind, fields, match):
    with pytest.raises(ValueError, match=match):
        make(kind, **fields)


@pytest.mark.parametrize("case", ["heun", "ddim", "guided", "training"])
def test_the_cost_of_a_step(case):
    net = costs.wide()
    params = net.init(jax.random.key(0))
    process = Gaussian(schedule=Cosine(), prediction="v")
    fields = dict(network=net, process=process, spec=DataSpec((costs.SIZE,)))
    x = jnp.ones((8, costs.SIZE))
    inputs = toys.inputs(x, params={"student": params, "teacher": params})
    if case == "training":
        objective = make(lib.ConsistencyTraining, **fields, last_levels=20)
    else:

        def predict(params, z, t, cond):
            return process.predict(net.apply(params, z, cond), z, t)

        fields |= dict(teacher=Teacher(predict, True), num_levels=8)
        if case == "guided":
            fields["spec"] = DataSpec((costs.SIZE,), 3)
            fields["guidance_scale"] = 2.0
            batch = {"x": x, "label": jnp.zeros(8, jnp.int32)}
            inputs = inputs._replace(batch=batch)
        solver = "ddim" if case == "ddim" else "heun"
        objective = make(**fields, solver=solver)
    found = costs.network_evaluations(objective, "train", inputs)
    said = {"heun": 6, "ddim": 5, "guided": 8, "training": 4}[case]
    assert objective.evaluations == {"train": said}
    np.testing.assert_allclose(found, said, rtol=0.1)
