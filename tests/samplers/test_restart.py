"""Restart: its flat list of times, its steps up, and the variance of gaussian data."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import gaussian

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, grids
from diffusionlab.samplers.edm import Heun
from diffusionlab.samplers.restart import Restart
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import DataSpec, Prediction

COSINE = Gaussian(schedule=Cosine(), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="v")
STD = 0.5
KEYS = jax.random.split(jax.random.key(0), 3)
Z = jnp.array([[-1.5], [0.2], [2.0]])


def true(process, t, std=STD):
    alpha, sigma = np.float64(process.schedule.alpha_sigma(jnp.float32(t)))
    return alpha**2 * std**2 + sigma**2


def levels(process, t):
    alpha, sigma = np.float64(process.schedule.alpha_sigma(jnp.float32(t)))
    return sigma / alpha


def factors(sampler, process, times):
    """`a [N], b [N]` of the steps z_s = a z_t + b noise, in float64."""

    def latent(z, t, s):
        state = base.State(jnp.full((1, 1), z), jnp.zeros((1, 1)))
        step = sampler.step(process, gaussian(process, std=STD), state, t, s, KEYS[:1])
        return step.z[0, 0]

    with mock.patch.object(base, "normal", lambda keys, shape: jnp.ones((1, 1))):
        step = jax.jit(jax.vmap(jax.value_and_grad(latent), (None, 0, 0)))
        scale, factor = (np.float64(q) for q in step(0.0, times[:-1], times[1:]))
    return factor, scale


def variances(start, factor, scale):
    found = [start]
    for a, b in zip(factor, scale, strict=True):
        found.append(a**2 * found[-1] + b**2)
    return np.array(found)


@pytest.mark.parametrize("process", [COSINE, FLOW])
def test_the_times_are_the_main_grid_with_the_intervals_walked_again(process):
    restarts = ((0.5, 2.0, 2, 1), (0.06, 0.3, 3, 2))
    times = Restart(num_steps=4, restarts=restarts).times(process.schedule)
    low, high = 0.06 ** (1 / 7), 0.3 ** (1 / 7)
    third = [(high + j / 3 * (low - high)) ** 7 for j in range(4)]
    middle = ((2.0 ** (1 / 7) + 0.5 ** (1 / 7)) / 2) ** 7
    loops = {0.5: [2.0, middle, 0.5], 0.06: third + third}
    main = [*levels(process, [0.75, 0.5, 0.25]), 0.5, 0.06]
    expected = []
    for level in sorted(main, reverse=True):
        expected += [level, *loops.get(level, [])]
    assert times.dtype == np.float32 and times[0] == 1.0 and times[-1] == 0.0
    # A time is rounded at 6e-8; at level 0.06, near t = 0.04, that is 2e-6 of it.
    np.testing.assert_allclose(levels(process, times[1:-1]), expected, rtol=2e-5)


def test_a_low_end_that_is_a_stop_is_walked_once():
    schedule = FLOW.schedule
    stop = float(levels(FLOW, 0.25))
    sampler = Restart(num_steps=4, restarts=((stop, 2.0, 1, 1),))
    times = sampler.times(schedule)
    assert np.sum(np.diff(times) > 0) == 1
    assert sampler.num_evaluations == 2 * np.sum(np.diff(times) <= 0) - 1


@pytest.mark.parametrize(
    ("num_steps", "restarts", "expected"),
    [
        (1, ((0.06, 0.3, 4, 2),), 2 * (1 + 1 + 8) - 1),
        (2, ((0.06, 0.3, 2, 1), (0.06, 1.0, 1, 2), (0.5, 1.0, 9, 0)), 13),
        (3, (), 5),
    ],
)
def test_evaluations_are_as_many_as_stated(num_steps, restarts, expected):
    calls = []

    def predict(z_t, t):
        calls.append(float(t))
        return Prediction(0.5 * z_t, 0.5 * z_t)

    sampler = Restart(num_steps=num_steps, restarts=restarts)
    times = sampler.times(COSINE.schedule)
    with jax.disable_jit():
        base.solve(sampler, COSINE, predict, Z, times, KEYS)
    assert len(calls) == sampler.num_evaluations == expected


@pytest.mark.parametrize("restarts", [(), ((0.06, 0.3, 4, 0),)])
def test_without_repeats_it_is_heun(restarts):
    samplers = Restart(num_steps=5, restarts=restarts), Heun(num_steps=5)
    found, expected = (
        jax.jit(
            lambda z, s=s: base.solve(
                s, FLOW, gaussian(FLOW, std=STD), z, s.times(FLOW.schedule), KEYS
            )
        )(Z)
        for s in samplers
    )
    # Equal steps; the branch is compiled into another program.
    np.testing.assert_allclose(found.z, expected.z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("process", [COSINE, FLOW])
def test_a_step_up_is_the_forward_process(process):
    times = np.float32([0.0, 0.02, 0.3, 0.7, 1.0])
    factor, scale = factors(Restart(num_steps=1), process, times)
    alpha, sigma = np.float64(process.schedule.alpha_sigma(times))
    np.testing.assert_allclose(factor, alpha[1:] / alpha[:-1], rtol=1e-5)
    added = np.sqrt(sigma[1:] ** 2 - (factor * sigma[:-1]) ** 2)
    np.testing.assert_allclose(scale, added, rtol=1e-5)


@pytest.mark.parametrize("process", [COSINE, FLOW])
def test_the_marginals_of_gaussian_data_are_kept(process):
    """Up is exact; down are Heun steps, of an error that 256 make small."""
    grid = grids.Rho(sigma_max=1e4)
    restarts = ((0.06, 0.3, 64, 2), (0.5, 3.0, 64, 1))
    times = Restart(num_steps=256, grid=grid, restarts=restarts).times(process.schedule)
    times = times[np.argmax(levels(process, times) < 20) :]
    factor, scale = factors(Restart(num_steps=1), process, times)
    found = variances(true(process, times[0]), factor, scale)
    np.testing.assert_allclose(found, true(process, times), rtol=5e-3)
    assert np.sum(scale > 0) == 3


def test_a_restart_contracts_the_error_of_what_came_before():
    """Noise of 0.3 over 0.06 leaves a share of an error in the variance."""
    sampler = Restart(num_steps=1, restarts=((0.06, 0.3, 32, 1),))
    times = sampler.times(COSINE.schedule)[1:-1]
    factor, scale = factors(sampler, COSINE, times)
    start = true(COSINE, times[0])
    errors = [
        variances(1.5 * start, factor, scale)[-1] - start,
        variances(start, factor, scale)[-1] - start,
    ]
    # Of 1.5 the data part c / (c + S²) is kept going up, and scaled back going down.
    share = (STD**2 + 0.06**2) / (STD**2 + 0.3**2)
    assert (errors[0] - errors[1]) / (0.5 * start) == pytest.approx(share, rel=2e-3)


def test_each_repeat_draws_its_own_noise():
    sampler = Restart(num_steps=1, restarts=((0.06, 0.3, 1, 2),))
    ones = []
    draw = base.normal

    def normal(keys, shape):
        ones.append(draw(keys, shape))
        return ones[-1]

    with mock.patch.object(base, "normal", normal), jax.disable_jit():
        base.solve(
            sampler,
            COSINE,
            gaussian(COSINE, std=STD),
            Z,
            sampler.times(COSINE.schedule),
            KEYS,
        )
    assert len(ones) == 2 and len(np.unique(np.concatenate(ones))) == 6


@pytest.mark.parametrize(
    "interval", [(1e-5, 0.3, 4, 2), (0.1, 1e4, 4, 1), (0.1, 0.100000001, 4, 1)]
)
def test_an_interval_outside_the_schedule_is_refused(interval):
    sampler = Restart(num_steps=4, restarts=(interval,))
    with pytest.raises(ValueError, match=r"restarts: .*(inside those of|too close)"):
        sampler.times(COSINE.schedule)


def test_an_unstable_main_grid_is_refused():
    with pytest.raises(ValueError, match="num_steps: .* unstable"):
        Restart(num_steps=4).check(COSINE, DataSpec((4,)))
    Restart(num_steps=20, grid=grids.Rho()).check(COSINE, DataSpec((4,)))


@pytest.mark.parametrize(
    ("restarts", "message"),
    [
        ([[0.1, 0.3, 4]], "expected .sigma_min, sigma_max, num_steps, repeats."),
        ([[0.3, 0.1, 4, 2]], "0 < sigma_min < sigma_max"),
        ([[0.1, 0.3, 0, 2]], "at least 1 step"),
        ([[0.1, 0.3, 4, -1]], "0 repeats"),
        ([0.1], "got 0.1"),
    ],
)
def test_an_entry_that_is_no_interval_is_refused(restarts, message):
    block = {"name": "restart", "num_steps": 4, "restarts": restarts}
    with pytest.raises(ValueError, match=f"config.sampler.restarts: .*{message}"):
        registry.build("sampler", block, "config.sampler")
    built = registry.build(
        "sampler", block | {"restarts": [[0.1, 0.3, 4, 2]]}, "config"
    )
    assert built.restarts == ((0.1, 0.3, 4, 2),)
    hash(built)
