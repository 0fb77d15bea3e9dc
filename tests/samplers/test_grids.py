"""The times of samplers: every grid on every schedule, and each by its formula."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.samplers import grids
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.discrete_beta import DiscreteBeta
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.linear_logsnr import LinearLogsnr
from diffusionlab.schedules.variance_exploding import VarianceExploding

ARGUMENTS = {
    "shifted_cosine": {"resolution": 64, "reference": 32},
    "interpolated_cosine": {"resolution": 64, "low": 16, "high": 64},
    "edm": {"preserving": False},
}
GRIDS = {
    "uniform": {},
    "quadratic": {},
    "logsnr": {},
    "rho": {},
    "shifted": {"shift": 3.0},
    "from": {"first_logsnr": -2.0},
}
BLOCKS = [
    *({"name": name, **GRIDS.get(name, {})} for name in registry.table("grid")),
    {"name": "logsnr", "logsnr_max": None},
    {"name": "rho", "sigma_min": 1e-9, "sigma_max": 1e9, "rho": 3.0},
    {"name": "shifted", "shift": 0.5, "grid": {"name": "rho"}},
    {"name": "quadratic", "power": 0.5},
]
NUM_STEPS = (1, 2, 24)


def build(block):
    return registry.build("grid", block, "config.sampler.grid")


@functools.cache
def schedule(name):
    block = {"name": name, **ARGUMENTS.get(name, {})}
    return registry.build("schedule", block, "config.schedule")


def times(grid, schedule, num_steps):
    return np.asarray(grid(schedule, num_steps), np.float32)


def levels(schedule, t):
    """sigma / alpha, float64."""
    return np.exp(-0.5 * np.float64(schedule.logsnr(t)))


@pytest.mark.parametrize("name", registry.table("schedule"))
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: "-".join(map(str, b.values())))
def test_times_lead_strictly_from_noise_to_data(block, name):
    if "rho" in str(block) and name.startswith("alpha_"):
        pytest.skip("levels sigma / alpha are of gaussian noise")
    for num_steps in NUM_STEPS:
        if block["name"] == "custom":
            # A custom grid has one length: any strictly decreasing list is taken.
            uniform = np.linspace(1, 0, num_steps + 1)
            block = {**block, "times": tuple(map(float, uniform**2))}
        t = times(build(block), schedule(name), num_steps)
        assert t.shape == (num_steps + 1,)
        if block["name"] == "from":
            first = float(schedule(name).logsnr(t[0]))
            assert first == pytest.approx(-2.0, abs=1e-2) and t[0] < 1.0
            t = t / t[0]
        noisiest = levels(schedule(name), 1.0)
        highest = block.get("sigma_max", 80.0)
        if block["name"] == "rho" and noisiest > highest:
            assert levels(schedule(name), t[0]) == pytest.approx(highest, rel=1e-4)
        elif "rho" not in str(block) or noisiest <= highest:
            assert t[0] == 1.0
        assert t[-1] == 0.0
        assert np.all(np.diff(t) < 0), (num_steps, t)


def test_the_default_is_uniform_and_quadratic_its_square():
    uniform = times(grids.Uniform(), None, 10)
    np.testing.assert_allclose(uniform, 1 - np.arange(11) / 10, atol=6e-8)
    quadratic = times(grids.Quadratic(), None, 10)
    np.testing.assert_allclose(quadratic, uniform**2, rtol=1e-6)
    cubic = times(grids.Quadratic(power=3.0), None, 10)
    np.testing.assert_allclose(cubic, uniform**3, rtol=1e-6)


@pytest.mark.parametrize("of", [Cosine(), Flow(), VarianceExploding(), DiscreteBeta()])
def test_logsnr_has_equal_steps_up_to_its_last_stop(of):
    t = times(grids.Logsnr(), of, 12)
    logsnr = np.float64(of.logsnr(t[:-1]))
    first = float(of.logsnr(1.0))
    # t is rounded at 6e-8 near 1; the steepest schedule there has a slope of 1e5.
    expected = np.linspace(first, 9.0, 12)
    np.testing.assert_allclose(logsnr, expected, atol=1e-2)
    np.testing.assert_allclose(logsnr[1:], expected[1:], atol=1e-3)


@pytest.mark.parametrize("of", [Cosine(), VarianceExploding()])
def test_logsnr_without_a_last_stop_goes_to_the_end(of):
    t = times(grids.Logsnr(logsnr_max=None), of, 12)
    ends = (float(of.logsnr(t)) for t in (1.0, 0.0))
    np.testing.assert_allclose(of.logsnr(t), np.linspace(*ends, 13), atol=2e-3)


@pytest.mark.parametrize(
    ("of", "grid"),
    [
        (LinearLogsnr(), {"name": "logsnr", "logsnr_max": None}),
        (VarianceExploding(), {"name": "logsnr", "logsnr_max": None}),
    ],
)
def test_equal_steps_of_a_straight_logsnr_are_uniform(of, grid):
    np.testing.assert_allclose(
        times(build(grid), of, 9), times(grids.Uniform(), of, 9), atol=1e-6
    )


@pytest.mark.parametrize("num_steps", [2, 3, 18])
def test_rho_is_the_published_grid(num_steps):
    """Equation 5 of arXiv 2206.00364: t_N = 0, and t_0 ... t_{N-1} are noise levels."""
    i = np.arange(num_steps)
    root = 80 ** (1 / 7) + i / (num_steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    # A schedule that goes beyond the grid's last level, and EDM's, which ends there.
    for of in (Edm(sigma_min=1e-4, sigma_max=80.0, preserving=False), Edm()):
        t = times(grids.Rho(), of, num_steps)
        np.testing.assert_allclose(levels(of, t[:-1]), root**7, rtol=2e-5)
    if num_steps == 18:
        assert levels(of, t)[1] == pytest.approx(57.586, abs=0.01)


def test_rho_stays_within_the_schedule():
    of = VarianceExploding(sigma_min=0.01, sigma_max=50.0)
    t = times(grids.Rho(), of, 10)
    root = np.linspace(50 ** (1 / 7), 0.01 ** (1 / 7), 10)
    np.testing.assert_allclose(levels(of, t[:-1]), root**7, rtol=2e-5)


def test_the_discrete_grid_walks_the_chain():
    of = DiscreteBeta()
    whole = times(grids.Discrete(), of, 1000)
    np.testing.assert_allclose(whole[:-2] * 999, np.arange(999, 0, -1), rtol=1e-6)
    # The cleanest step of the chain is a noise level, and clean data come after it.
    np.testing.assert_allclose(of.logsnr(whole[-2]), of.logsnr(0.0), rtol=1e-5)
    assert 0.0 == whole[-1] < whole[-2]
    steps = {
        "trailing": [999, 749, 499, 249],
        "leading": [750, 500, 250, 0],
        "linspace": [999, 666, 333, 0],
    }
    for spacing, k in steps.items():
        t = times(grids.Discrete(spacing=spacing), of, 4)
        np.testing.assert_allclose(t[:-1] * 999, k, atol=2e-4)


def test_the_discrete_grid_is_of_the_schedules_chain():
    with pytest.raises(ValueError, match="num_timesteps: is 1000, .* chain has 100"):
        grids.Discrete()(DiscreteBeta(num_timesteps=100), 10)
    with pytest.raises(ValueError, match="num_steps: 11 are more than the chain's 10"):
        grids.Discrete(num_timesteps=10)(Cosine(), 11)


def test_stops_that_fall_together_are_refused():
    sampler = Ddim(num_steps=1000, grid=grids.Quadratic(power=16.0))
    with pytest.raises(ValueError, match="grid: 1000 steps are too many"):
        sampler.times(Cosine())


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_a_shift_adds_to_the_logsnr_of_flow(shift):
    # Without its ends, flow has sigma / alpha = t / (1 - t), which is multiplied.
    t = times(grids.Shifted(shift=shift), None, 8)[1:-1].astype(np.float64)
    u = np.arange(7, 0, -1) / 8
    np.testing.assert_allclose(t / (1 - t), shift * u / (1 - u), rtol=2e-6)
    logsnr = Flow().logsnr(jnp.float32(t)) - Flow().logsnr(jnp.float32(u))
    np.testing.assert_allclose(logsnr, -2 * math.log(shift), atol=2e-3)


def test_a_shift_moves_the_grid_it_is_given():
    inner = grids.Quadratic()
    t = times(inner, None, 6)
    found = times(grids.Shifted(shift=2.0, grid=inner), None, 6)
    np.testing.assert_allclose(found, 2 * t / (1 + t), rtol=1e-6)


def test_from_scales_a_grid_to_its_first_noise_level():
    of = Cosine()
    t = times(grids.From(first_logsnr=-3.0), of, 4)
    assert float(of.logsnr(t[0])) == pytest.approx(-3.0, abs=1e-4)
    np.testing.assert_allclose(t / t[0], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    inner = grids.Quadratic()
    scaled = times(grids.From(first_logsnr=-3.0, grid=inner), of, 4)
    np.testing.assert_allclose(scaled / t[0], times(inner, of, 4), atol=1e-6)
    # The noisy end of the schedule is a first level too, and the clean one is none.
    ends = [float(of.logsnr(jnp.float32(end))) for end in (1.0, 0.0)]
    whole = times(grids.From(first_logsnr=ends[0]), of, 2)
    np.testing.assert_allclose(whole, [1, 0.5, 0], atol=1e-4)
    for wrong in (ends[0] - 1, ends[1]):
        with pytest.raises(ValueError, match="grid.first_logsnr: must be between"):
            grids.From(first_logsnr=wrong)(of, 2)


def test_a_custom_grid_is_itself():
    given = (1.0, 0.9, 0.2, 0.0)
    np.testing.assert_array_equal(
        times(grids.Custom(times=given), None, 3), np.float32(given)
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: grids.Quadratic(power=0.0), "^power: "),
        (lambda: grids.Rho(sigma_min=0.0), "^sigma_min: "),
        (lambda: grids.Rho(sigma_min=2.0, sigma_max=1.0), "^sigma_min: "),
        (lambda: grids.Rho(rho=0.0), "^rho: "),
        (lambda: grids.Shifted(shift=-1.0), "^shift: "),
        (lambda: grids.Custom(times=()), "^times: "),
        (lambda: grids.Custom(times=(1.0,)), "^times: "),
        (lambda: grids.Custom(times=(1.0, 0.5)), "^times: "),
        (lambda: grids.Custom(times=(0.9, 0.0)), "^times: "),
        (lambda: grids.Custom(times=(1.0, 0.5, 0.5, 0.0)), "^times: "),
        (
            lambda: grids.Custom(times=(1.0, 0.0))(None, 2),
            r"^grid\.times: 2 steps need 3 times, got 2",
        ),
        (lambda: grids.Logsnr(logsnr_max=15.5)(Cosine(), 4), r"^grid\.logsnr_max: "),
        (lambda: grids.Logsnr(logsnr_max=-16.0)(Cosine(), 4), r"^grid\.logsnr_max: "),
        (
            lambda: grids.Rho(sigma_min=100.0, sigma_max=200.0)(VarianceExploding(), 4),
            r"^grid\.sigma_min: ",
        ),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
