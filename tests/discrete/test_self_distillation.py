"""Self-distillation through time: targets by enumeration, best students, rounds."""

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_discrete_moment_matching as matching
import test_discrete_moment_matching_fixture as fixture

from diffusionlab.distillation import self_distillation_through_time as sdtt
from diffusionlab.processes.categorical import Categorical
from diffusionlab.samplers import grids
from diffusionlab.samplers.tokens import TokenAncestral
from diffusionlab.schedules.alpha import Linear
from diffusionlab.types import CategoricalPrediction, DataSpec

PROCESS = fixture.PROCESS
STATES = np.asarray(fixture.STATES)


def make(process=PROCESS, network=None, **fields):
    network = network or matching.tables()
    return sdtt.SelfDistillationThroughTime(
        **{
            "process": process,
            "networks": {"denoiser": network},
            "spec": process.spec,
            "teacher": matching.taught(process, network),
            "num_steps": 1,
            "num_rounds": 1,
            "steps_per_round": 4,
            **fields,
        }
    )


def answer(z, t):
    return CategoricalPrediction(fixture.TEACHER[3 * z[:, 0] + z[:, 1]])


def targets(number):
    """`number` targets of two steps from two masks at t = 1, `[number, 2, 2]`."""
    stops = [jnp.full(number, t) for t in (1.0, 0.5, 0.0)]
    z = jnp.full((number, 2), PROCESS.mask)
    call = jax.jit(lambda key: sdtt.target(PROCESS, answer, key, z, stops))
    return np.asarray(call(jax.random.key(0)))


def test_targets_are_what_was_said_when_a_token_was_revealed():
    found = np.exp(targets(4000))
    # Revealed in the first step or both in the second: a half. Else, of the other.
    half = np.isclose(found, 0.5).all(axis=(1, 2))
    assert half.mean() == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)
    one = found[~half]
    sure = np.isclose(one[:, :, 0], 0.5, atol=1e-6)
    np.testing.assert_array_equal(sure.sum(axis=1), 1)
    np.testing.assert_allclose(one[~sure].max(axis=-1), 0.98, atol=1e-5)
    assert sure[:, 0].mean() == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)


def test_known_tokens_stay_and_one_step_is_the_teacher():
    z = jnp.int32(STATES)
    stops = [jnp.full(9, t) for t in (0.8, 0.4)]
    once = sdtt.target(PROCESS, answer, jax.random.key(0), z, stops)
    np.testing.assert_array_equal(once, fixture.TEACHER)
    known = PROCESS.mask != STATES
    twice = sdtt.target(
        PROCESS, answer, jax.random.key(0), z, [*stops, jnp.full(9, 0.0)]
    )
    np.testing.assert_array_equal(twice[known], fixture.TEACHER[known])


def test_the_best_of_forward_is_the_teacher_and_of_reverse_is_surer():
    # A lopsided pair: the mean of the targets is p(x_i), of which nothing is learned.
    joint = enumerated.Joint(np.array([[0.7, 0.05], [0.05, 0.2]]))
    table = fixture.tables(joint)
    said = lambda z, t: CategoricalPrediction(table[3 * z[:, 0] + z[:, 1]])  # noqa: E731
    number = 8000
    stops = [jnp.full(number, t) for t in (1.0, 0.5, 0.0)]
    z = jnp.full((number, 2), PROCESS.mask)
    draw = jax.jit(lambda: sdtt.target(PROCESS, said, jax.random.key(1), z, stops))
    log_target = draw()

    @jax.jit
    def slope(log_p, word):
        def loss(logits):
            log_p = jax.nn.log_softmax(logits)
            log_p = jnp.broadcast_to(log_p, log_target.shape)
            each = [
                sdtt.divergence(w, log_p, log_target) for w in ("forward", "reverse")
            ]
            return jnp.where(word == 0, *each).mean()

        return jax.grad(loss)(log_p)

    # 5 standard errors; the targets have a standard deviation below 0.3.
    noise = 5 * 0.3 / number**0.5
    marginal = jnp.log(jnp.float32([[0.75, 0.25]] * 2))
    np.testing.assert_allclose(slope(marginal, 0), 0, atol=noise / 2)  # of 2 tokens
    geometric = jax.nn.log_softmax(log_target.mean(axis=0))
    np.testing.assert_allclose(slope(geometric, 1), 0, atol=1e-4)  # of float32 sums
    np.testing.assert_allclose(
        jnp.exp(log_target).mean(axis=0), jnp.exp(marginal), atol=noise
    )
    # Three quarters of the targets are p(x_i), the others p(x_i | the other token).
    other = 0.75 * np.log(0.7 / 0.05) + 0.25 * np.log(0.05 / 0.2)
    wanted = 1 / (1 + np.exp(-0.75 * np.log(3) - 0.25 * other))
    assert wanted == pytest.approx(0.7742, abs=5e-5)
    # These log-ratios have a standard deviation below 1, and p (1 - p) < 0.2.
    np.testing.assert_allclose(
        jnp.exp(geometric)[:, 0], wanted, atol=5 * 0.2 / number**0.5
    )
    assert np.abs(slope(marginal, 1)).min() > noise / 2


def test_the_loss_is_zero_for_equal_answers_and_of_masked_positions_alone():
    objective = make()
    x = jnp.int32([[0, 1], [1, 1]] * 8)
    table = {"table": jnp.zeros((2, 9, 2, 2))}
    params = {"student": table, "previous": table, "teacher": {"denoiser": table}}
    inputs = matching.given(jax.random.key(0), x, params)
    for loss in (objective.first_loss, objective.later_loss):
        value, slope = jax.value_and_grad(lambda p, f=loss: f(p, inputs)[0])(
            {"student": table}
        )
        assert value == 0 and not np.any(slope["student"]["table"])
    # From pure noise, in one step of two: KL from a half is known.
    logits = jnp.zeros((2, 9, 2, 2)).at[..., 1].set(1.0)
    own = {"student": {"table": logits}}
    slope, metrics = jax.grad(objective.first_loss, has_aux=True)(own, inputs)
    p = 1 / (1 + np.e)
    kl = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(kl, rel=1e-5)
    assert metrics["entropy"][0] / metrics["entropy"][1] == pytest.approx(
        np.log(2) - kl, rel=1e-5
    )
    # Of t = 1 there is one state, and all other rows of the table are idle.
    np.testing.assert_array_equal(slope["student"]["table"][:, :8], 0)
    assert np.any(slope["student"]["table"][0, 8])


def test_samplers_with_other_steps_are_refused():
    make(num_steps=2).check_sampler(TokenAncestral(num_steps=2))
    with pytest.raises(ValueError, match="grid: this student makes equal steps"):
        uneven = TokenAncestral(num_steps=2, grid=grids.Cosine())
        make(num_steps=2).check_sampler(uneven)


def test_rounds():
    objective = make(num_rounds=3, num_steps=2)
    phases = [objective.phase(step) for step in (0, 3, 4, 11)]
    assert phases == ["first", "first", "later", "later"]
    assert [step for step in range(20) if objective.transition(step)] == [4, 8]
    assert [int(objective.num_steps_at(step)) for step in (0, 4, 8, 30)] == [8, 4, 2, 2]
    assert objective.transitions["halve"].copy == {"previous": "student"}


def test_cost():
    process = Categorical(spec=DataSpec((1,), num_tokens=2), schedule=Linear())
    objective = make(process, matching.wide())
    params = {
        n: matching.wide().init(jax.random.key(0)) for n in ("student", "previous")
    }
    params["teacher"] = {"denoiser": params["student"]}
    x = jnp.zeros((256, 1), jnp.int32)
    inputs = matching.given(jax.random.key(1), x, params)
    for phase, expected in objective.evaluations.items():
        counted = matching.costs.network_evaluations(objective, phase, inputs)
        assert counted == pytest.approx(expected, rel=0.1), phase


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "config.teacher: missing"),
        ({"num_rounds": 0}, "num_rounds: must be at least 1"),
        ({"divergence": "both"}, "divergence: expected reverse or forward"),
        ({"network": matching.tables()._replace(is_causal=True)}, "name: the objecti"),
        ({"process": matching.uniform(fixture.JOINT)}, "process.noise: self-dist"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
