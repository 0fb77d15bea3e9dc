"""Discrete moment matching: the objective against enumeration, its errors, its cost."""

import pathlib
import sys

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_discrete_moment_matching_fixture as fixture

from diffusionlab.distillation import discrete_moment_matching as dmm
from diffusionlab.distillation import input_noise
from diffusionlab.processes.categorical import Categorical
from diffusionlab.samplers import grids
from diffusionlab.samplers.token_orders import TokenConfidence
from diffusionlab.samplers.tokens import TokenAncestral, TokenTweedie
from diffusionlab.schedules.alpha import Linear
from diffusionlab.types import DataSpec, Inputs, Network, Teacher

sys.path.append(str(pathlib.Path(__file__).parents[1] / "distillation"))
import costs

SPEC = DataSpec((2,), num_tokens=2)
UNIFORM = {"input_noise": "none", "weight": "one", "targets": "hard"}


def tables():
    """A generator `[2, 9, 2, 2]` by noise symbol, z_t and position.

    The symbol is the sign of the first number of the noise.
    """

    def apply(params, z, cond, *, train=False, key=None):
        symbol = jnp.zeros(len(z), jnp.int32)
        if "noise" in cond:
            symbol = (cond["noise"][:, 0, 0] > 0).astype(jnp.int32)
        return params["table"][symbol, 3 * z[:, 0] + z[:, 1]]

    return Network(lambda key: {"table": fixture.start(2, 0)}, apply, (), noise_input=1)


def taught(process, network, has_null_label=False):
    """A teacher that answers as `network` does with its parameters."""

    def predict(params, z_t, t, cond):
        t = jnp.broadcast_to(t, z_t.shape[:1])
        raw = network.apply(params["denoiser"], z_t, {**cond, "t": t})
        return process.predict(raw, z_t, t)

    return Teacher(predict, has_null_label)


def make(process=fixture.PROCESS, network=None, **fields):
    network = network or tables()
    return dmm.DiscreteMomentMatching(
        **{
            "process": process,
            "networks": {"denoiser": network},
            "spec": process.spec,
            "teacher": taught(process, network),
            "num_steps": 1,
            "input_noise": "gaussian",
            **fields,
        }
    )


def given(key, x, params):
    return Inputs({"x": x}, key, jnp.int32(0), params, {})


def averaged(loss, own, params, joint, size=2048, repeats=16):
    """Means and standard errors of value and gradient of a loss, over the data."""

    @jax.jit
    def one(key):
        which = jax.random.choice(
            key, len(joint.probs), (size,), p=jnp.asarray(joint.probs)
        )
        x = jnp.int32(joint.sequences)[which]
        inputs = given(jax.random.fold_in(key, 1), x, params)
        found = jax.value_and_grad(lambda p: loss(p, inputs)[0])(own)
        return jax.tree.map(jnp.float32, found)

    found = [one(key) for key in jax.random.split(jax.random.key(8), repeats)]
    found = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    error = jax.tree.map(lambda a: a.std(axis=0, ddof=1) / repeats**0.5, found)
    return jax.tree.map(lambda a: a.mean(axis=0), found), error


def near(found, error, wanted, atol):
    # Five standard errors of 16 repeats: one in ten thousand for each number.
    for a, e, b in zip(*map(jax.tree.leaves, (found, error, wanted)), strict=True):
        assert np.all(np.abs(a - np.asarray(b)) <= 5 * e + atol), (a, b, e)


PARAMS = {
    "student": {"table": jax.random.normal(jax.random.key(1), (2, 9, 2, 2))},
    "aux": {"table": jax.random.normal(jax.random.key(2), (2, 9, 2, 2))},
    "teacher": {"denoiser": {"table": jnp.stack([fixture.TEACHER] * 2)}},
}


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_students_loss_has_the_exact_expectation(num_steps):
    objective = make(num_steps=num_steps)
    own = {"student": PARAMS["student"]}
    found, error = averaged(objective.student_loss, own, PARAMS, fixture.JOINT, 8192)
    # Answered without noise, which is symbol 0.
    aux = fixture.answers(PARAMS["aux"]["table"])[0]
    exact = fixture.gradient(PARAMS["student"]["table"], num_steps, aux)
    assert abs(exact[0]) > 15 * error[0]
    # The midpoints of 24 intervals of s and 6 of t.
    near(found, error, exact, atol=4e-3)


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_the_auxiliary_loss_has_its_least_at_the_mean_of_both(targets):
    # At one time t and s, where the optimum is a table.
    s, student = jnp.float32(0.5), PARAMS["student"]
    log_x = fixture.answers(student["table"])
    weight = fixture.noised(1.0)[None, :, None] * fixture.step(log_x, 1.0, s)
    mean = fixture.moments(log_x, weight[None])[0]
    best = jnp.log((mean + jnp.exp(fixture.TEACHER)) / 2)
    objective = make(targets=targets)
    own = {"aux": {"table": jnp.stack([best] * 2)}}

    def loss(params, inputs):
        with pytest.MonkeyPatch.context() as patch:
            fixed = lambda self, key, size: (jnp.ones(size), jnp.full(size, s))  # noqa: E731
            patch.setattr(dmm.moment_matching, "times", fixed)
            return objective.aux_loss(params, inputs)

    found, error = averaged(loss, own, PARAMS, fixture.JOINT)
    near(found[1], error[1], jax.tree.map(jnp.zeros_like, found[1]), atol=1e-6)
    moved = {"aux": PARAMS["aux"]}
    worse, error = averaged(loss, moved, PARAMS, fixture.JOINT)
    assert worse[0] - found[0] > 10 * error[0]


def oracle(process, joint, leave_one_out=False):
    """The exact denoiser of one or two tokens under uniform noise, at any time."""
    table, k = jnp.float32(joint.table), joint.num_tokens

    def apply(params, z, cond, *, train=False, key=None):
        alpha = process.schedule.alpha(cond["t"])[:, None, None]
        likely = alpha * jax.nn.one_hot(z, k) + (1 - alpha) / k
        if joint.length == 1:
            both = jnp.broadcast_to(table, likely.shape)
            return jnp.log(both if leave_one_out else both * likely) + params["off"]
        left = jnp.einsum("ij,bj->bi", table, likely[:, 1])
        right = jnp.einsum("ij,bi->bj", table, likely[:, 0])
        found = jnp.stack([left, right], axis=1)
        return jnp.log(found if leave_one_out else found * likely) + params["off"]

    return Network(lambda key: {"off": jnp.zeros(k)}, apply, ())


def uniform(joint, prediction="denoiser"):
    spec = DataSpec((joint.length,), num_tokens=joint.num_tokens)
    return Categorical(
        spec=spec, schedule=Linear(), noise="uniform", prediction=prediction
    )


def test_under_uniform_noise_an_exact_student_is_the_fixed_point():
    joint = enumerated.Joint(np.array([0.6, 0.3, 0.1]))
    process = uniform(joint)
    network = oracle(process, joint)
    objective = make(process, network, num_steps=2, **UNIFORM)
    at = {"off": jnp.zeros(3)}
    params = {"student": at, "aux": at, "teacher": {"denoiser": at}}
    found, error = averaged(objective.aux_loss, {"aux": at}, params, joint)
    near(found[1], error[1], {"aux": at}, atol=1e-5)
    value, slope = jax.value_and_grad(
        lambda p: objective.student_loss(p, given(jax.random.key(0), X3, params))[0]
    )({"student": at})
    assert value == 0 and not np.any(slope["student"]["off"])


X3 = jnp.int32([[0], [1], [2], [0]])


def test_a_network_that_leaves_each_position_out_is_read_as_a_denoiser():
    joint = enumerated.bits(0.9)
    x = jnp.int32(joint.sequences)
    own, other = ({"off": jnp.float32([0.0, q])} for q in (0.3, -0.5))
    params = {
        "student": own,
        "aux": other,
        "teacher": {"denoiser": {"off": jnp.zeros(2)}},
    }
    answers = []
    for prediction in ("denoiser", "leave_one_out"):
        process = uniform(joint, prediction)
        network = oracle(process, joint, prediction == "leave_one_out")
        objective = make(process, network, num_steps=2, **UNIFORM)
        inputs = given(jax.random.key(5), x, params)
        losses = (objective.student_loss, objective.aux_loss)
        answers.append([loss(params, inputs)[0] for loss in losses])
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)
    assert abs(answers[0][0]) > 1e-2


def test_squared_error_in_this_game_is_twice_moment_matching():
    keys = jax.random.split(jax.random.key(0), 4)
    own, taught_x, aux, weights = (jax.random.normal(key, (5, 3)) for key in keys)
    weights = weights[:, :1] ** 2
    student = lambda a: jnp.tanh(own * a)  # noqa: E731
    square = lambda p, q: (weights * (p - q) ** 2).sum()  # noqa: E731

    def game(a):
        # The third term has no gradient here; z_s has none in either.
        return square(student(a), taught_x) - square(student(a), aux)

    def classic(a):
        return (weights * student(a) * (aux - taught_x)).sum()

    at = jnp.float32([0.3, -0.7, 1.2])
    found, wanted = jax.grad(game)(at), 2 * jax.grad(classic)(at)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    # Its auxiliary loss has its least at the mean of both, as equation 1 does.
    least = jax.grad(lambda p: square(student(at), p) + square(p, taught_x))
    np.testing.assert_allclose(least((student(at) + taught_x) / 2), 0, atol=1e-6)


def test_a_nucleus_offset_keeps_the_loss_finite(monkeypatch):
    probs = np.float32([[0.5, 0.3, 0.15, 0.05], [0.02, 0.9, 0.05, 0.03]])
    log_probs = jnp.log(probs)
    inside = np.array([[True, True, False, False], [False, True, False, False]])
    found = dmm.sharpened(log_probs, 1.0, 0.8)
    wanted = probs * np.where(inside, 1, np.exp(-2))
    wanted /= wanted.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(jnp.exp(found), wanted, rtol=1e-5)
    other = jnp.log(jnp.float32([[0.1, 0.2, 0.3, 0.4], [0.25] * 4]))
    ratio = np.abs(other - log_probs).max()
    assert np.abs(other - found).max() <= ratio + 2
    weight = jnp.ones(2)
    loss = dmm.student_error(other, other, found, weight, np.inf)
    assert np.all(np.abs(loss) < ratio + 2)
    monkeypatch.setattr(dmm, "TOP_P_OFFSET", 1e20)
    broken = dmm.sharpened(log_probs, 1.0, 0.8)
    assert dmm.student_error(other, other, broken, weight, np.inf).max() > 1e18
    clipped = dmm.student_error(other, other, broken, weight, 20.0)
    assert np.all(clipped <= 20)


def test_temperature():
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (6, 5)))
    assert dmm.sharpened(log_probs, 1.0, 1.0) is log_probs
    cold = jnp.exp(dmm.sharpened(log_probs, 0.5, 1.0))
    squared = jnp.exp(2 * log_probs)
    np.testing.assert_allclose(
        cold, squared / squared.sum(-1, keepdims=True), rtol=1e-5
    )


def test_input_noise_has_variance_one_at_every_position():
    keys = jax.random.split(jax.random.key(0), 4000)
    for kind, shape in (("gaussian", (3,)), ("pyramid", (4, 6, 1))):
        found = input_noise.batch(kind, keys, shape, 2)
        noise = np.asarray(found).reshape(4000, -1)
        assert noise.shape[1] == 2 * np.prod(shape)
        # Standard errors: 1 / sqrt(4000), and sqrt(2) times that of a variance.
        np.testing.assert_allclose(noise.mean(axis=0), 0, atol=5 / 4000**0.5)
        np.testing.assert_allclose(noise.var(axis=0), 1, atol=7.1 / 4000**0.5)
    image = noise.reshape(4000, 4, 6, 2)
    # Sides 1, 2 and 4: neighbours share two levels, or one across the middle.
    near_by = (image[:, 0, 0, 0] * image[:, 1, 0, 0]).mean()
    across = (image[:, 0, 0, 0] * image[:, 3, 5, 0]).mean()
    other = (image[:, 0, 0, 0] * image[:, 0, 0, 1]).mean()
    found = [near_by, across, other]
    np.testing.assert_allclose(found, [2 / 3, 1 / 3, 0], atol=5 * 1.5 / 4000**0.5)


def test_samples_have_fresh_noise_at_every_step_and_in_every_example():
    objective = make()
    params = {"student": PARAMS["student"]}
    z, keys = jnp.full((64, 2), 2), jax.random.split(jax.random.key(0), 64)
    answer = jax.jit(
        lambda t, keys: objective.predict(params, z, t, {"key": keys}).logits
    )
    first, again, second = (answer(t, keys) for t in (1.0, 1.0, 0.5))
    np.testing.assert_array_equal(first, again)
    # Two symbols: a half of the examples, give or take 5 sqrt(64) / 2.
    changed = np.any(first != second, axis=(1, 2)).sum()
    differing = np.any(first != first[:1], axis=(1, 2)).sum()
    assert 12 <= changed <= 52 and 12 <= differing <= 52
    np.testing.assert_array_equal(answer(1.0, keys[::-1]), first[::-1])
    silent = make(input_noise="none").predict(params, z, 1.0, {"key": keys}).logits
    np.testing.assert_array_equal(silent, jnp.broadcast_to(silent[:1], silent.shape))


def wide():
    """`costs.wide` with the logits of two tokens for its one."""
    net = costs.wide()

    def apply(params, z, cond, *, train=False, key=None):
        one = net.apply(params, z, cond)
        return jnp.stack([one, -one], axis=-1)

    return net._replace(apply=apply)


@pytest.mark.parametrize("fields", [{}, {"average_targets": False, "targets": "soft"}])
def test_cost(fields):
    process = Categorical(spec=DataSpec((1,), num_tokens=2), schedule=Linear())
    objective = make(process, wide(), input_noise="none", **fields)
    params = {name: wide().init(jax.random.key(0)) for name in ("student", "aux")}
    params["teacher"] = {"denoiser": params["student"]}
    inputs = given(jax.random.key(1), jnp.zeros((256, 1), jnp.int32), params)
    for phase, expected in objective.evaluations.items():
        counted = costs.network_evaluations(objective, phase, inputs)
        assert counted == pytest.approx(expected, rel=0.1), phase


def test_phases_take_turns():
    objective = make(aux_steps=2)
    assert [objective.phase(step) for step in range(4)] == [
        "aux",
        "aux",
        "student",
        "aux",
    ]
    assert objective.phases["aux"].trains == ("aux",)
    assert set(objective.roles) == {"student", "aux"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "config.teacher: missing"),
        ({"guidance_scale": 2.0}, "guidance_scale: 2.0 needs a teacher"),
        ({"num_steps": 0}, "num_steps: must be at least 1"),
        ({"times_option": "all"}, "times_option: expected continuous or grid"),
        ({"input_noise": "pyramid"}, "input_noise: 'pyramid' is for images"),
        ({"input_noise": "other"}, "input_noise: expected none or gaussian"),
        (
            {"network": tables()._replace(noise_input=0)},
            "needs a network that takes it",
        ),
        ({"teacher_top_p": 1.5}, "teacher_top_p: must be above 0 and at most 1"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: must be above 0, got"),
        ({"min_t": 0.0}, "min_t: must be above 0 and at most 1"),
        ({"process": uniform(fixture.JOINT)}, "weight: 'elbo' is for masked noise"),
        ({"network": tables()._replace(is_causal=True)}, "name: the objective 'discr"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("field", "word"), [("targets", "soft"), ("input_noise", "gaussian")]
)
def test_what_is_for_masks_alone_is_refused_by_name(field, word):
    with pytest.raises(ValueError, match=f"{field}: '{word}' is for masked noise"):
        make(uniform(fixture.JOINT), **{**UNIFORM, field: word})


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (TokenAncestral(num_steps=3), "num_steps: is 3, but config.objective.num_step"),
        (
            TokenAncestral(num_steps=2, grid=grids.Custom(times=(1.0, 0.7, 0.0))),
            "grid: con",
        ),
        (TokenConfidence(num_steps=2), "name: this student's tokens are drawn as in"),
    ],
)
def test_samplers_that_make_other_steps_are_refused(sampler, message):
    objective = make(num_steps=2)
    objective.check_sampler(TokenAncestral(num_steps=2, top_p=0.7))
    objective.check_sampler(TokenTweedie(num_steps=2))
    with pytest.raises(ValueError, match=message):
        objective.check_sampler(sampler)
