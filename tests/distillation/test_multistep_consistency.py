"""Multistep consistency on N(0, c²) data: its table of known numbers, and the loss."""

import dataclasses
import functools

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
import toys

from diffusionlab.distillation import base, fine_steps
from diffusionlab.distillation.multistep_consistency import (
    MultistepConsistency,
    pseudo_huber,
)
from diffusionlab.objectives.denoising import pool
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.types import DataSpec, Network, Prediction, Teacher

PROCESS = tables.PROCESS
SQUARED = {"huber_epsilon": 1e3}  # sqrt(m + e²) - e is m / (2 e)


def make(number=1, c=1.0, **fields):
    given = {
        "process": PROCESS,
        "networks": {"denoiser": tables.network(number)},
        "spec": DataSpec((1,)),
        "teacher": tables.teacher(c),
        "xvar_frac": 0.0,
        **dict.fromkeys(("first_teacher_steps", "last_teacher_steps"), number),
    }
    return MultistepConsistency(**{**given, **fields})


def every(segments, each):
    segment, step = np.divmod(np.arange(segments * each), each)
    return fine_steps.fine_steps(
        jnp.int32(segment), jnp.int32(step + 1), segments, each
    )


@functools.partial(jax.jit, static_argnums=0)
def targets(objective, a, fine, z, x=0.0, eps=0.0):
    """Equation 2 at z `[B, 1]`, for the student a(t) z."""
    x, eps = (jnp.broadcast_to(q, z.shape) for q in (x, eps))
    params = {"teacher": {}}
    first, _ = objective.taught(params, x, eps, z, fine, {})
    return objective.target({"a": a}, first, z, fine, {})


@functools.partial(jax.jit, static_argnums=(0, 1))
def measured(objective, count, student, x, key=5):
    """The loss on `count` copies of the data x, with its metrics, for student a."""
    params = {"student": student}
    x = jnp.tile(x, (count, 1))
    return objective.loss(params, toys.inputs(x, jax.random.key(key), params=params))


@functools.cache
def solved(segments, each, c):
    """The a `[T + 1]` that equation 2 gives back: every fine step from the one before.

    Segments have nothing to do with each other, so they are solved side by side.
    """
    number = segments * each
    objective = make(number, c, num_steps=segments)

    def body(a, step):
        segment = jnp.arange(segments)
        fine = fine_steps.fine_steps(
            segment, jnp.full_like(segment, step), segments, each
        )
        found = targets(objective, a, fine, jnp.ones((segments, 1)))
        return a.at[segment * each + step].set(found[:, 0]), None

    solve = jax.jit(lambda a: jax.lax.scan(body, a, jnp.arange(1, each + 1))[0])
    return objective, solve(jnp.zeros(number + 1))


def test_the_number_of_teacher_steps_is_annealed():
    objective = make(num_steps=1, first_teacher_steps=64, last_teacher_steps=1280)
    steps = np.array([0, 25_000, 50_000, 75_000, 100_000, 200_000])
    found = jax.vmap(objective.steps_per_segment)(steps)
    # 64, 135.34, 286.22, 605.27, 1280, in whole numbers.
    np.testing.assert_array_equal(found, [64, 135, 286, 605, 1280, 1280])
    eight = dataclasses.replace(objective, num_steps=8)
    assert int(eight.steps_per_segment(0)) == 8
    assert int(eight.steps_per_segment(25_000)) == 17
    assert int(eight.steps_per_segment(100_000)) == 160
    few = dataclasses.replace(objective, num_steps=16, first_teacher_steps=4)
    assert int(few.steps_per_segment(0)) == 1


@pytest.mark.parametrize("num_steps", [1, 4])
def test_one_fine_step_of_training_is_the_denoising_loss(num_steps):
    objective = make(num_steps, num_steps=num_steps, mode="training", **SQUARED)
    x = jax.random.normal(jax.random.key(1), (64, 1))
    fine = every(num_steps, 1)
    z = x[:num_steps]
    np.testing.assert_array_equal(
        targets(objective, jnp.zeros(num_steps + 1), fine, z, x=z + 1.0), z + 1.0
    )
    # With f = 0 the residual is x itself.
    _, metrics = measured(objective, 1, {"a": jnp.zeros(num_steps + 1)}, x)
    assert float(metrics["mse"][0]) == pytest.approx(float(jnp.sum(x**2)), rel=1e-6)


@pytest.mark.parametrize(
    ("segments", "known"),
    [
        (1, {64: 2.61e-4, 256: 1.63e-5, 1280: 6.53e-7}),
        (2, {64: 7.17e-4, 256: 8.78e-5, 1280: 7.85e-6}),
    ],
)
def test_the_residual_at_the_exact_student(segments, known):
    for number, expected in known.items():
        fine = every(segments, number // segments)
        i = np.arange(1, number + 1)
        t, b = i / number, (i - 1) // (number // segments) / segments
        a = np.concatenate([[0.0], tables.jump(t, b, 0.5)])
        z = np.sqrt(tables.variance(t, 0.5))[:, None].astype(np.float32)
        objective = make(number, 0.5, num_steps=segments)
        found = targets(objective, jnp.asarray(a, jnp.float32), fine, z)
        residual = np.float64(found)[:, 0] - a[1:] * z[:, 0]
        # Three printed digits, and rounding of numbers below 1 in float32.
        assert np.sqrt(np.mean(residual**2)) == pytest.approx(
            expected, rel=2e-3, abs=6e-8
        )


def test_the_exact_student_in_known_numbers():
    for t, b, expected in ((0.5, 0, 0.632456), (1, 0.5, 0.118034), (1, 0, 0.5)):
        assert tables.jump(t, b, 0.5) == pytest.approx(expected, abs=1e-6)
    assert tables.denoiser(0.5, 0.5) == pytest.approx(0.28284, abs=1e-5)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [(2, 0.63246), (4, 0.40203), (8, 0.33354), (16, 0.30649), (64, 0.28848)],
)
def test_many_steps_are_a_denoiser(segments, expected):
    """a(0.5) of the student to which training leads, against that of the flow."""
    assert tables.jump(0.5, 0.5 - 1 / segments, 0.5) == pytest.approx(
        expected, abs=1e-5
    )
    coarse, fine = (
        solved(segments, number // segments, 0.5)[1][number // 2]
        for number in (256, 512)
    )
    # The teacher's steps are of first order; what is left is of second: 2e-5 of a
    # segment of four steps.
    assert float(2 * fine - coarse) == pytest.approx(expected, abs=1e-4)
    assert float(coarse) != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("number", "expected"), [(4, 0.72855), (64, 0.98091), (1280, 0.99904)]
)
def test_training_leads_where_the_teachers_ddim_does(number, expected):
    _, a = solved(1, number, 1.0)
    assert float(a[number]) == pytest.approx(expected, abs=1e-5)
    known = np.cos(np.pi / (2 * number)) ** number
    assert float(a[number]) == pytest.approx(known, abs=3e-6)


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_the_solved_student_has_no_gradient(mode):
    """In training the mean of x given z_t is what the teacher says."""
    number, c, segments = 12, 0.5, 3
    objective, a = solved(segments, number // segments, c)
    objective = dataclasses.replace(objective, mode=mode, **SQUARED)
    fine = every(segments, number // segments)
    # Two points with the moments of each gaussian, so that all means are exact.
    fine = jax.tree.map(lambda q: jnp.repeat(q, 4), fine)
    sign = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    x, eps = (np.tile(sign[:, k : k + 1], (number, 1)) for k in range(2))
    x = c * x
    z = PROCESS.mix(x, eps, fine.t)

    def loss(a):
        target = targets(objective, jax.lax.stop_gradient(a), fine, z, x, eps)
        found = base.apply(objective, {"a": a}, z, fine.t, {}).x
        return jnp.mean((found - target) ** 2)

    gradient, other = map(jax.jit(jax.grad(loss)), (a, a + 0.01))
    # Each entry is a mean of numbers of order 1 over all times.
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    assert np.all(np.abs(other[1:]) > 3e-5)


@pytest.mark.parametrize("xvar_frac", [0.0, 0.75])
def test_one_segment_is_a_consistency_model(xvar_frac):
    number, c = 8, 0.7
    objective = make(number, c, num_steps=1, xvar_frac=xvar_frac)
    x = c * jax.random.normal(jax.random.key(3), (64, 1))
    params = {"student": {"a": jnp.linspace(0.2, 0.9, number + 1)}}
    inputs = toys.inputs(x, key=5, params=params)

    def consistency(params):
        keys = base.split(inputs.key, 3)
        step = jax.random.randint(keys[1], (64,), 1, number + 1)
        t, s = step / number, (step - 1) / number
        z, _ = PROCESS.corrupt(keys[2], x, t)
        taught = tables.teacher(c).predict({}, z, t, {})
        mean = taught.eps[:, 0] ** 2
        (alpha, sigma), (alpha_s, sigma_s) = (
            PROCESS.schedule.alpha_sigma(q) for q in (t, jnp.maximum(s, 1e-9))
        )
        kappa = alpha_s - alpha * sigma_s / sigma
        xvar = xvar_frac * (taught.x - x)[:, 0] ** 2
        scale = jnp.sqrt(sigma_s**2 + kappa**2 * xvar / mean)
        z_s = alpha_s[:, None] * taught.x + scale[:, None] * taught.eps
        a = params["student"]["a"]
        target = jnp.where((step == 1)[:, None], z_s, a[step - 1][:, None] * z_s)
        error = a[step][:, None] * z - jax.lax.stop_gradient(target)
        norm = jnp.sqrt(error[:, 0] ** 2 + 1e-8) - 1e-4
        return jnp.mean(norm / sigma)

    expected = jax.jit(jax.value_and_grad(consistency))(params)
    found = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, inputs)[0]))(params)
    # Where the error is of the size of huber_epsilon, its rounding tells in the norm's
    # direction.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_gradients_flow_into_the_student_at_t_alone():
    objective = make(8, 0.7, num_steps=2, xvar_frac=0.75)
    x = jax.random.normal(jax.random.key(3), (16, 1))
    params = {"student": {"a": jnp.linspace(0.2, 0.9, 9)}}

    def loss(own, everyone):
        return objective.loss(own, toys.inputs(x, params=everyone))[0]

    own, others = jax.jit(jax.grad(loss, (0, 1)))(params, params)
    assert np.any(own["student"]["a"])
    assert not np.any(others["student"]["a"])


def test_dropout_is_the_same_in_both_passes():
    """Noise of the network cancels where its two answers are compared."""

    def apply(params, z, cond, *, train=False, key=None):
        assert train
        return params["a"] * z + 100.0 * jax.random.normal(key, z.shape)

    network = Network(lambda key: {"a": jnp.float32(0.5)}, apply, ())
    # With one segment from data on, the target is the network's answer but at s = 0.
    objective = make(1000, num_steps=1, networks={"denoiser": network}, reduction="sum")
    x = jax.random.normal(jax.random.key(0), (32, 1))
    _, metrics = measured(objective, 1, {"a": jnp.float32(0.5)}, x)
    assert float(metrics["mse"][0]) / 32 < 1.0


def test_the_teacher_is_guided_and_its_variance_is_not():
    def predict(params, z, t, cond):
        label = cond["label"][:, None]
        return Prediction(jnp.where(label == 2, 1.0, 3.0) * jnp.ones_like(z), z)

    teacher = Teacher(predict, has_null_label=True)
    objective = make(
        spec=DataSpec((1,), 2), teacher=teacher, guidance_scale=4.0, xvar_frac=0.75
    )
    fine, x = every(1, 4), jnp.zeros((4, 1))
    z = jnp.ones((4, 1))
    cond = {"label": jnp.zeros(4, jnp.int32)}
    taught = jax.jit(lambda z: objective.taught({"teacher": {}}, x, x, z, fine, cond))
    first, square = taught(z)
    np.testing.assert_array_equal(square, 9.0)
    guided = Prediction(jnp.full((4, 1), 1.0 + 4.0 * 2.0), z)
    xvar = jnp.full(4, 0.75 * 9.0)
    expected = fine_steps.addim_x(PROCESS, guided, xvar, fine.t, fine.s)
    np.testing.assert_allclose(first, expected, rtol=1e-6)


def test_the_norms():
    error = np.float32(np.random.default_rng(0).normal(size=(3, 4, 4, 2)))
    square = np.float64(error) ** 2
    spec = {"spec": DataSpec((4, 4, 2)), "huber_epsilon": 0.3}
    huber = lambda m: np.sqrt(m + 0.09) - 0.3  # noqa: E731
    pixels = (1, 2, 3)
    expected = {
        "mean": huber(square.mean(pixels)),
        "sum": huber(square.sum(pixels)),
        "elementwise": huber(square).mean(pixels),
    }
    for reduction, norm in expected.items():
        found = make(reduction=reduction, **spec).norm(error)
        np.testing.assert_allclose(found, norm, rtol=1e-5)
    found = make(scales=(2, 4), **spec).norm(error)
    pooled = np.float64(pool(error, 2))
    half = huber((pooled**2).mean(pixels)) / 2
    np.testing.assert_allclose(found, half + expected["mean"] / 4, rtol=1e-5)


def test_the_huber_function_is_a_norm_and_a_square():
    m = jnp.float32([0.0, 1e-12, 0.25, 4.0])
    np.testing.assert_allclose(pseudo_huber(m, 1e-4)[2:], [0.5, 2.0], atol=1.1e-4)
    np.testing.assert_allclose(pseudo_huber(m, 1e3), m / 2e3, rtol=1e-5)
    slope = jax.vmap(jax.grad(lambda m: pseudo_huber(m, 1e-4)))(m)
    np.testing.assert_allclose(slope[0], 0.5e4, rtol=1e-5)


@pytest.mark.parametrize(("weight", "power"), [("sqrt(snr+1)", 0.5), ("snr+1", 1.0)])
def test_the_loss_is_weighted(weight, power):
    """The fine steps of k = 2 with n = 1 are at t = 1, where SNR = 0, and t = 0.5."""
    objective = make(2, num_steps=2, mode="training", weight=weight, huber_epsilon=1e-6)
    # f = 0: the norm is that of x.
    student = {"a": jnp.zeros(3)}
    found, metrics = measured(objective, 4000, student, jnp.float32([[2.0]]))
    # Half of the times are 0.5, of weight 2^power; that many within five deviations.
    share = (float(found) / 2.0 - 1.0) / (2.0**power - 1.0)
    assert share == pytest.approx(0.5, abs=0.04)
    total, count = metrics["loss_by_logsnr"]
    assert float(total.sum()) == pytest.approx(float(metrics["loss"][0]), rel=1e-5)
    assert float(count.sum()) == 4000
    assert float(metrics["teacher_steps"][0]) == 2


def test_samples_depend_on_their_first_noise_alone():
    objective, a = solved(4, 16, 0.5)
    sampler = Ddim(num_steps=4)
    objective.check_sampler(sampler)
    z = jax.random.normal(jax.random.key(0), (8, 1))

    @jax.jit
    def draw(keys):
        predict = lambda z, t: objective.predict(  # noqa: E731
            {"student": {"a": a}}, z, t, {}
        )
        times = sampler.times(PROCESS.schedule)
        return samplers.solve(sampler, PROCESS, predict, z, times, keys).x

    one, other = (draw(jax.random.split(jax.random.key(k), 8)) for k in range(2))
    np.testing.assert_array_equal(one, other)
    # The teacher's 64 steps, made in four.
    expected = np.prod(tables.factors(64, 0.5)) * z
    np.testing.assert_allclose(one, expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 5.0),
        ({"mode": "training", "teacher": None}, 4.0),
        ({"guidance_scale": 2.0}, 6.0),
    ],
)
def test_the_network_evaluations_are_those_that_xla_counts(fields, expected):
    net = costs.wide()

    def predict(params, z, t, cond):
        # XLA would see that two equal answers are one.
        seen = z + cond["label"][:, None]
        return PROCESS.predict(net.apply(params["denoiser"], seen, cond), z, t)

    given = {
        "networks": {"denoiser": net},
        "teacher": Teacher(predict, has_null_label=True),
        "spec": DataSpec((1,), 2),
        "xvar_frac": 0.75,
        "num_steps": 2,
    }
    objective = make(8, **{**given, **fields})
    assert objective.evaluations == {"train": expected}
    params = net.init(jax.random.key(0))
    inputs = toys.inputs(jnp.ones((32, 1)), params={"student": params})
    inputs.params["teacher"] = {"denoiser": params}
    inputs.batch["label"] = jnp.zeros(32, jnp.int32)
    found = costs.network_evaluations(objective, "train", inputs)
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "config.teacher: missing"),
        ({"mode": "both"}, "mode: expected distillation or training, got 'both'"),
        ({"mode": "training", "guidance_scale": 2.0}, "guidance_scale: 2.0 is of the"),
        ({"guidance_scale": 2.0}, "guidance_scale: 2.0 needs a teacher"),
        ({"num_steps": 0}, "num_steps: must be at least 1"),
        ({"anneal_steps": 0}, "anneal_steps: must be at least 1"),
        ({"last_teacher_steps": 0}, "last_teacher_steps: must be at least 1"),
        ({"xvar_frac": -0.1}, "xvar_frac: must be at least 0"),
        ({"huber_epsilon": 0.0}, "huber_epsilon: must be positive"),
        ({"reduction": "max"}, "reduction: expected mean or sum or elementwise"),
        ({"weight": "snr"}, r"weight: expected sqrt\(snr\+1\) or snr\+1, got 'snr'"),
        ({"scales": (2,)}, "scales: need square images"),
        ({"scales": (3,), "spec": DataSpec((4, 4, 1))}, "scales: expected divisors"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
