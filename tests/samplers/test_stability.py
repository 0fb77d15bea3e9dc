"""The recursion of variances by hand, and when it refuses; see also test_sde."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import stability
from diffusionlab.schedules.flow import Flow

PROCESS = Gaussian(schedule=Flow(), prediction="v", sigma_data=0.5)


def test_the_ratios_are_those_of_the_recursion():
    times = np.float32([1.0, 0.6, 0.2, 0.0])
    ratios = stability.variance_ratios(
        PROCESS,
        times,
        lambda t, s: (1.0 + t, jnp.float32(0.3)),
        lambda i, variance: variance + i,
    )
    alpha, sigma = np.float64(PROCESS.schedule.alpha_sigma(times))
    true = 0.25 * alpha**2 + sigma**2
    first = 2.0**2 * true[0] + 0.3**2
    second = 1.6**2 * first + 0.3**2 + 1.0
    expected = [1.0, first / true[1], second / true[2]]
    np.testing.assert_allclose(ratios, expected, rtol=1e-5)


def test_the_denoiser_is_exact_for_the_data_of_the_process():
    t, z = jnp.float32([0.1, 0.9]), jnp.float32([1.0, -2.0])
    x, eps = stability.denoiser(PROCESS)(z, t)
    np.testing.assert_allclose(PROCESS.mix(x, eps, t), z, rtol=1e-5)
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    np.testing.assert_allclose(x / eps, 0.25 * alpha / sigma, rtol=1e-5)


def test_what_is_refused():
    stability.refuse(np.array([1.0, 9.9, 1.9]), 2.0)
    for ratios in ([1.0, 10.1, 1.0], [1.0, 1.0, 2.1]):
        with pytest.raises(ValueError, match=f"{max(ratios)} times the true one"):
            stability.refuse(np.array(ratios), 2.0)
