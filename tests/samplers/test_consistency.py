"""Consistency sampling: predict, add fresh noise, predict again."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import ones

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, grids
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import Prediction

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
KEYS = jax.random.split(jax.random.key(0), 5)
STD = 0.5


def consistent(z_t, t):
    """Where the probability flow of N(0, STD²) data leads: every x_hat is a sample."""
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    x = STD * z_t / jnp.sqrt(alpha**2 * STD**2 + sigma**2)
    return Prediction(x, (z_t - alpha * x) / sigma)


def test_a_step_adds_fresh_noise_to_the_prediction():
    sampler = Consistency(num_steps=4)
    z = jnp.array([[-1.5], [0.2], [2.0], [0.0], [1.0]])
    t, s = jnp.float32(0.75), jnp.float32(0.5)
    with mock.patch.object(base, "normal", ones):
        state = sampler.step(PROCESS, consistent, sampler.init(z, t), t, s, KEYS)
    alpha, sigma = PROCESS.schedule.alpha_sigma(s)
    x = consistent(z, t).x
    np.testing.assert_allclose(state.x, x, rtol=1e-6)
    np.testing.assert_allclose(state.z, alpha * x + sigma, rtol=1e-6)
    np.testing.assert_array_equal(sampler.final(state), state.x)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_consistency_function_gives_the_data_at_any_number_of_steps(num_steps):
    keys = jax.random.split(jax.random.key(1), 1 << 14)
    sampler = Consistency(num_steps=num_steps)
    x = jax.jit(lambda k: base.sample(sampler, PROCESS, consistent, k, (1,)))(keys)
    # The standard error is 0.5 / sqrt(2 * 16384) = 0.0028.
    assert float(x.std()) == pytest.approx(STD, abs=0.011)
    assert abs(float(x.mean())) < 0.016


@pytest.mark.parametrize(("num_steps", "fresh"), [(1, False), (2, True)])
def test_the_noise_of_its_steps_matters_from_two_on(num_steps, fresh):
    grid = grids.From(first_logsnr=-4.0)
    sampler, noise = Consistency(num_steps=num_steps, grid=grid), jnp.ones((5, 1))
    found = [
        base.sample(sampler, PROCESS, consistent, keys, (1,), noise)
        for keys in (KEYS, jax.random.split(jax.random.key(9), 5))
    ]
    assert np.all(found[0] != found[1]) == fresh


def test_it_is_built_by_name_with_the_grid_of_a_generator():
    block = {"name": "from", "first_logsnr": -2.0}
    block = {"name": "consistency", "num_steps": 3, "grid": block}
    sampler = registry.build("sampler", block, "config.sampler")
    assert sampler.num_evaluations == 3
    first = float(PROCESS.schedule.logsnr(sampler.times(PROCESS.schedule)[0]))
    assert first == pytest.approx(-2.0, abs=1e-4)
    with pytest.raises(ValueError, match="num_steps: must be at least 1, got 0"):
        Consistency(num_steps=0)
