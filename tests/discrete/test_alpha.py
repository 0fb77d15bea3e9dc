"""Schedules of tokens against the same formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SCHEDULES

from diffusionlab import registry
from diffusionlab.schedules import alpha as alphas

# Of float32 times, whose digits both sides see.
TIMES = np.float32([1e-6, 1e-3, 0.1, 0.3, 0.5, 0.8, 0.97, 1 - 1e-3, 1 - 2.0**-20])


def numbers(schedule, t):
    """alpha, noise, alpha', logsnr and its derivative, and the inverse of logsnr."""

    def all_of(t):
        logsnr = schedule.logsnr(t)
        return (
            schedule.alpha(t),
            schedule.noise(t),
            schedule.alpha_derivative(t),
            logsnr,
            schedule.derivative(t),
            schedule.inverse(logsnr),
        )

    return [np.asarray(a, np.float64) for a in jax.jit(all_of)(jnp.asarray(t))]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_is_exact_also_near_the_ends(name):
    schedule, alpha, slope = SCHEDULES[name]
    t = np.float64(TIMES)
    found = numbers(schedule, TIMES)
    share, rest = alpha(t), 1 - alpha(t)
    # Twenty roundings of float32, and two of float64 of what is compared with.
    np.testing.assert_allclose(found[0], share, rtol=2e-6, atol=4e-16)
    np.testing.assert_allclose(found[1], rest, rtol=2e-6, atol=4e-16)
    # The slope of cosines is that of an angle as small as 0.012, known to 6e-8.
    np.testing.assert_allclose(found[2], slope(t), rtol=5e-6)
    inner = (rest > 1e-6) & (share > 1e-6)
    assert inner.sum() >= 6
    share, rest = share[inner], rest[inner]
    logsnr, derivative = np.log(share / rest), slope(t[inner]) / (share * rest)
    np.testing.assert_allclose(found[3][inner], logsnr, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(found[4][inner], derivative, rtol=8e-6)
    # The error of logsnr, at most 16 * 6e-8 * 4, over its slope, which is at least 4.
    np.testing.assert_allclose(found[5][inner], t[inner], atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_ends_are_exact_and_all_is_finite_there(name):
    schedule, alpha, _ = SCHEDULES[name]
    ends = np.float32([0, 1])
    found = numbers(schedule, ends)
    assert all(np.isfinite(a).all() for a in found)
    end = schedule.end
    last = end if end else getattr(schedule, "eps", 0.0)
    np.testing.assert_allclose(found[0], [1 - end, last], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found[1], [end, 1 - last], rtol=1e-6, atol=1e-12)
    # Its noise is 1e-7 where logsnr ends, t = 1e-7^(1/3) for the cube.
    np.testing.assert_allclose(found[5], [0, 1], atol=5e-3)
    assert found[5][1] > 1 - 3e-4
    assert np.abs(found[3]).max() < 16.2
    fine = numbers(schedule, np.linspace(0, 1, 257, dtype=np.float32))
    assert np.all(np.diff(fine[0]) < 0)
    # Between the bounds of logsnr; the cube of 1/256 is beyond.
    assert np.all(np.diff(fine[3])[np.abs(fine[3][:-1]) < 16.1] < 0)
    assert np.all(np.diff(fine[3]) <= 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_inverse_of_much_noise_is_the_schedules_own_level(name):
    # From logsnr to t and back; t near 1 has steps of 6e-8, alpha there 6e-8 / alpha.
    schedule, alpha, _ = SCHEDULES[name]
    low, high = np.log(alpha(1.0) + 1e-4) + 0.1, 8.0
    logsnr = jnp.linspace(low, high, 33)
    found = jax.jit(lambda level: schedule.logsnr(schedule.inverse(level)))(logsnr)
    np.testing.assert_allclose(found, logsnr, atol=3e-3)


def test_log_linear_is_the_total_noise_of_scores():
    schedule = alphas.LogLinear(eps=1e-3)
    t = jnp.float32([0.1, 0.5, 1.0])
    total = -np.log1p(-(1 - 1e-3) * np.float64(t))
    np.testing.assert_allclose(-np.log(np.float64(schedule.alpha(t))), total, 1e-4)
    # The weight of the loss is 1 / t.
    rate = -schedule.alpha_derivative(t) / schedule.noise(t)
    np.testing.assert_allclose(rate, 1 / np.float64(t), 1e-6)


def test_linear_is_the_chain_of_absorbing_d3pm():
    steps = 20
    betas = 1 / (steps - np.arange(1, steps + 1) + 1)
    t = jnp.arange(1, steps + 1) / steps
    found = alphas.Linear().alpha(t)
    np.testing.assert_allclose(found, np.cumprod(1 - betas), atol=1e-7)


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"name": "alpha_linear", "end": 0.5}, "end"),
        ({"name": "alpha_cosine", "end": -0.1}, "end"),
        ({"name": "alpha_log_linear", "eps": 1.0}, "eps"),
        ({"name": "alpha_log_linear", "end": 0.7}, "end"),
        ({"name": "alpha_polynomial", "power": 0.0}, "power"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(block, field):
    with pytest.raises(ValueError, match=f"{field}: must be"):
        registry.build("schedule", block, "config")
