"""Pairs of noise levels: the numbers of iCT, the laws, the ratio of ECT."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.distillation import levels
from diffusionlab.samplers import grids
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.edm import Edm

SCHEDULE = Cosine()

ICT = levels.Curriculum(10, 1280, 2.0, 400_000)


def test_the_curriculum_doubles_every_50_000_steps():
    assert [n + 1 for n in ICT.counts] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert ICT.stage_steps == 50_000
    steps = jnp.array([0, 49_999, 50_000, 349_999, 350_000, 10**6])
    np.testing.assert_array_equal(ICT.stage(steps), [0, 0, 1, 6, 7, 7])


def test_a_curriculum_that_ends_between_two_powers_ends_there():
    found = levels.Curriculum(4, 25, 2.0, 90)
    assert found.counts == (4, 8, 16, 25)
    assert found.stage_steps == math.floor(90 / (math.log2(25 / 4) + 1))
    assert levels.Curriculum(18, 18).counts == (18,)


def test_a_level_has_the_probability_of_a_discretised_log_normal():
    schedule, mean, std = Edm(), -1.1, 2.0
    counts = (4, 8)
    found = levels.table(schedule, grids.Rho(), counts, mean, std)
    u = (np.arange(8) / 7)[::-1]
    s = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(
        levels.level(schedule, found.stops[1]), [*s, 0], rtol=1e-3
    )
    bound = [math.erf((math.log(q) - mean) / (math.sqrt(2) * std)) for q in s] + [-1]
    share = -np.diff(bound) / (bound[0] + 1)
    said = np.diff(np.minimum(found.upper[1], 1), prepend=0)
    np.testing.assert_allclose(said, share, atol=1e-3)
    t, s = levels.draw(jax.random.key(0), 512, found, 1)
    which = jnp.argmax(t[:, None] == found.stops[1][None, :-1], axis=1)
    drawn = np.bincount(which, minlength=8) / 512
    # Stratified: every share within one example at either end.
    np.testing.assert_allclose(drawn, share, atol=2 / 512 + 1e-3)
    np.testing.assert_array_equal(s, found.stops[1][which + 1])


def test_the_pairs_of_a_grid_are_alike_without_a_law():
    found = levels.table(SCHEDULE, grids.Uniform(), (2, 5), None, 1.0)
    for stage, number in enumerate((2, 5)):
        t, s = levels.draw(jax.random.key(1), 10 * number, found, jnp.int32(stage))
        place, count = np.unique(np.round(np.asarray(t) * number), return_counts=True)
        np.testing.assert_array_equal(place, np.arange(number) + 1)
        assert set(count) == {10}
        np.testing.assert_allclose(t - s, 1 / number, rtol=1e-5)
        assert t.dtype == s.dtype == jnp.float32


def test_a_ratio_is_a_share_of_the_level():
    @jax.jit
    def draw(number):
        key = jax.random.key(0)
        t, s = levels.draw_ratio(key, 64, SCHEDULE, number, -1.1, 2.0)
        of_t = levels.level(SCHEDULE, t)
        return jnp.log(of_t), s, levels.gap(SCHEDULE, t, s) / of_t

    for number in (1, 2, 256):
        logs, s, share = draw(jnp.float32(number))
        np.testing.assert_allclose([logs.mean(), logs.std()], [-1.1, 2.0], rtol=0.1)
        assert (number == 1) == (not np.any(s))
        # The rounding of t is 6e-8 of 1, a share of 1e-3 of the shortest gap.
        np.testing.assert_allclose(share, 1 / number, rtol=0.05)


def test_a_gap_is_a_difference_of_levels_and_never_a_rounding_of_one():
    schedule = SCHEDULE
    t, s = jnp.array([0.5, 0.5, 0.3]), jnp.array([0.0, 0.25, 0.2999])
    exact = np.tan(np.pi / 2 * np.asarray(t, np.float64)) - np.tan(
        np.pi / 2 * np.asarray(s, np.float64)
    )
    np.testing.assert_allclose(levels.gap(schedule, t, s), exact, rtol=1e-3)


def test_stops_that_fall_together_are_refused():
    grid = grids.Quadratic(power=20)
    with pytest.raises(ValueError, match="grid: 1000 levels are too many"):
        levels.table(SCHEDULE, grid, (1000,), None, 1.0)
