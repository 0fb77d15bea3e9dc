"""The adaptive probability-flow ODE against the exact map of gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import flow_map, gaussian

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base
from diffusionlab.samplers.probability_flow import ProbabilityFlow
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow

COSINE = Gaussian(schedule=Cosine(), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="v")
MEAN, STD = 0.3, 0.5
KEYS = jax.random.split(jax.random.key(0), 3)
Z = jnp.array([[-1.5, 0.1], [0.2, 0.4], [2.0, -3.0]])
DOWN, UP = np.float32([1.0, 0.0]), np.float32([0.01, 1.0])


@functools.cache
def program(sampler, process):
    predict = gaussian(process, MEAN, STD)
    return jax.jit(lambda z, t: base.solve(sampler, process, predict, z, t, KEYS))


@pytest.mark.parametrize(
    ("solver", "process", "tolerance"),
    [("tsit5", COSINE, 1e-4), ("dopri5", FLOW, 3e-4)],
)
def test_it_follows_the_exact_map(solver, process, tolerance):
    state = program(ProbabilityFlow(solver=solver), process)(Z, DOWN)
    # Ten steps or so, each accepted with an error of 1e-5 (1 + |z|).
    np.testing.assert_allclose(
        state.z, flow_map(process, Z, 1.0, 0.0, MEAN, STD), atol=tolerance
    )
    denoised = gaussian(process, MEAN, STD)(state.z, jnp.float32(0)).x
    np.testing.assert_allclose(state.x, denoised, rtol=1e-6)
    assert np.all(state.evaluations > 10) and np.all(state.evaluations < 100)


def test_it_runs_towards_noise_and_back():
    solve = program(ProbabilityFlow(), COSINE)
    up = solve(Z, UP)
    np.testing.assert_allclose(
        up.z, flow_map(COSINE, Z, 0.01, 1.0, MEAN, STD), atol=5e-4
    )
    np.testing.assert_allclose(solve(up.z, UP[::-1]).z, Z, atol=5e-4)
    # Only a step to t = 0 denoises.
    np.testing.assert_array_equal(up.x, 0.0)


def test_a_smaller_tolerance_costs_more_and_errs_less():
    coarse, fine = (
        program(ProbabilityFlow(rtol=tol, atol=tol), COSINE)(Z, DOWN)
        for tol in (1e-2, 1e-5)
    )
    expected = flow_map(COSINE, Z, 1.0, 0.0, MEAN, STD)
    assert np.all(fine.evaluations > coarse.evaluations)
    errors = [np.abs(state.z - expected).max() for state in (coarse, fine)]
    assert errors[0] > 10 * errors[1]


def test_sub_intervals_end_where_one_does():
    times = np.float32([1.0, 0.4, 0.0])
    one, two = (program(ProbabilityFlow(), COSINE)(Z, t) for t in (DOWN, times))
    np.testing.assert_allclose(two.z, one.z, atol=2e-4)
    assert np.all(two.evaluations > one.evaluations)


def test_the_reported_evaluations_are_those_made():
    """Counted at run time with a batch of one, whose loop ends when it does."""
    calls = []
    sampler = ProbabilityFlow(rtol=1e-3, atol=1e-3)
    predict = gaussian(COSINE, MEAN, STD)

    def counted(z_t, t):
        jax.debug.callback(lambda t: calls.append(float(t.max())), t)
        return predict(z_t, t)

    state = jax.jit(lambda z: base.solve(sampler, COSINE, counted, z, DOWN, KEYS[:1]))(
        Z[:1]
    )
    state.z.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == int(state.evaluations[0])
    assert calls[-1] == 0.0 and calls[0] == 1.0


def test_every_example_keeps_its_own_condition():
    """A network sees the labels of the whole batch, each at its place."""
    means = jnp.array([[-1.0], [0.0], [2.0]])

    @jax.jit
    def solve(means):
        predict = gaussian(COSINE, means, STD)
        return base.solve(ProbabilityFlow(), COSINE, predict, Z, DOWN, KEYS).x

    for i, mean in enumerate(means):
        alone = solve(jnp.broadcast_to(mean, means.shape))[i]
        np.testing.assert_allclose(solve(means)[i], alone, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    solve = program(ProbabilityFlow(), COSINE)
    others = Z.at[1:].multiply(30.0)
    first, second = solve(Z, DOWN), solve(others, DOWN)
    np.testing.assert_array_equal(first.z[0], second.z[0])
    assert first.evaluations[0] == second.evaluations[0]
    assert second.evaluations[2] != first.evaluations[2]


def test_an_example_that_runs_out_of_steps_is_not_a_number():
    sampler = ProbabilityFlow(max_steps=2)
    state = program(sampler, COSINE)(Z, DOWN)
    assert np.all(np.isnan(state.z)) and np.all(np.isnan(state.x))


def test_the_number_of_evaluations_is_not_known_beforehand():
    sampler = registry.build("sampler", {"name": "probability_flow"}, "config.sampler")
    assert sampler.num_evaluations is None
    np.testing.assert_array_equal(sampler.times(COSINE.schedule), DOWN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("solver", "heun"),
        ("rtol", 0.0),
        ("atol", -1.0),
        ("max_steps", 0),
    ],
)
def test_a_field_out_of_range_is_refused(field, value):
    block = {"name": "probability_flow", field: value}
    with pytest.raises(ValueError, match=f"config.sampler.{field}: "):
        registry.build("sampler", block, "config.sampler")
