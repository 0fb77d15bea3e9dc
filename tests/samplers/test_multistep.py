"""Multistep and Runge-Kutta methods where their integrals are exact."""

import functools

import jax.numpy as jnp
import known
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import multistep
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.variance_exploding import VarianceExploding
from diffusionlab.types import Prediction

PROCESSES = {
    "cosine": Gaussian(schedule=Cosine(), prediction="v"),
    "flow": Gaussian(schedule=Flow(), prediction="v"),
    "exploding": Gaussian(schedule=VarianceExploding(), prediction="v"),
}
TIMES = np.float32([0.9, 0.75, 0.6, 0.5, 0.35, 0.2])
Z = np.float32([[-1.2, 0.4], [0.1, 2.0]])
MULTISTEP = [
    ("adams_bashforth", {"order": 4}),
    ("deis", {"order": 4}),
    ("deis", {"order": 3, "variable": "log_rho"}),
    ("gradient_estimation", {}),
]
EVERY = [*MULTISTEP, ("runge_kutta_4", {})]
GRID = np.float64([0.001, 0.3, 0.9, 1.0, 1.1, 3.0, 20.0])


def build(name, options=(), num_steps=5):
    block = {"name": name, "num_steps": num_steps, **dict(options)}
    return registry.build("sampler", block, "config.sampler")


def eps_of(process, function):
    """A prediction whose eps_hat is a function of time alone."""

    def predict(z_t, t):
        alpha, sigma = process.schedule.alpha_sigma(t)
        eps = jnp.broadcast_to(function(t), z_t.shape)
        return Prediction((z_t - sigma * eps) / alpha, eps)

    return predict


@functools.cache
def exact(process):
    return known.gaussian(process, std=0.5)


def solve(sampler, process, predict, times=TIMES, z=Z):
    return known.solve(sampler, process, predict, times, z)


def rho(process, t):
    return jnp.exp(-0.5 * process.schedule.logsnr(t))


def test_exponential_moments():
    u, width = np.polynomial.legendre.leggauss(60)
    u, width = (u + 1.0) / 2.0, width / 2.0
    g = np.concatenate([-GRID, GRID])
    found = multistep.exponential_moments(jnp.float32(g), 4)
    for k, moment in enumerate(found):
        inside = g[:, None] * np.exp(-g[:, None] * (1.0 - u)) * u**k
        # Four recursions, and the rounding of exp at 20.
        np.testing.assert_allclose(moment, inside @ width, rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (1, [1.0, 0.0, 0.0, 0.0]),
        (2, [3 / 2, -1 / 2, 0.0, 0.0]),
        (3, [23 / 12, -16 / 12, 5 / 12, 0.0]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_weights_on_equal_steps_are_those_of_adams_and_bashforth(order, expected):
    moments = [jnp.float32(1 / (k + 1)) for k in range(4)]
    use = [order > k for k in (1, 2, 3)]
    found = multistep.weights([-1.0, -2.0, -3.0], moments, use)
    np.testing.assert_allclose(found, expected[1:], rtol=1e-6, atol=1e-6)
    assert 1.0 - sum(map(float, found)) == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("t", "s"), [(0.99, 0.98), (0.9, 0.7), (0.3, 0.1), (0.4, 0.0)])
def test_time_moments(name, t, s):
    process = PROCESSES[name]
    found = multistep._time_moments(process, jnp.float32(t), jnp.float32(s), 4)
    inner = np.linspace(t, s, 2001)
    level = np.float64(rho(process, jnp.float32(inner)))
    level = level / level[0] - 1.0
    u = np.linspace(0.0, 1.0, 2001)
    for k, moment in enumerate(found):
        rest = k * np.trapezoid(level * u ** (k - 1.0), u) if k else 0.0
        by_parts = level[-1] - rest
        # The schedule's logsnr is rounded, and the trapezoid is of order 2.
        assert float(moment) == pytest.approx(by_parts, rel=2e-4, abs=2e-6)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("sampler", "options"), EVERY)
def test_a_constant_eps_is_exact(name, sampler, options):
    process = PROCESSES[name]
    predict = eps_of(process, lambda t: jnp.float32(0.8))
    found = solve(build(sampler, options), process, predict)
    direct = solve(Ddim(num_steps=1), process, predict, TIMES[[0, -1]])
    np.testing.assert_allclose(found.z, direct.z, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["cosine", "flow"])
@pytest.mark.parametrize(
    ("sampler", "options", "degree", "variable"),
    [
        ("adams_bashforth", {"order": 2}, 1, "rho"),
        ("adams_bashforth", {"order": 4}, 3, "rho"),
        ("deis", {"order": 2}, 1, "t"),
        ("deis", {"order": 4}, 3, "t"),
        ("deis", {"order": 4, "variable": "log_rho"}, 3, "log_rho"),
        ("runge_kutta_4", {}, 3, "rho"),
    ],
)
def test_a_polynomial_in_its_variable_is_exact(
    name, sampler, options, degree, variable
):
    """Of as high a degree as there are earlier predictions, once they are there."""
    process = PROCESSES[name]
    scale = float(rho(process, TIMES[0]))

    def eps(t):
        level = rho(process, jnp.float32(t)) / scale
        q = {"rho": level, "t": t, "log_rho": jnp.log(level)}[variable]
        return sum((q - 0.4) ** k * (-0.5) ** k for k in range(degree + 1))

    predict = eps_of(process, eps)
    before, after = TIMES[:5], TIMES[:6]
    built = build(sampler, options)
    z_t, z_s = (solve(built, process, predict, q).z for q in (before, after))
    t, s = before[-1], after[-1]
    (alpha_t, _), (alpha_s, _) = (process.schedule.alpha_sigma(q) for q in (t, s))
    inner = jnp.linspace(t, s, 2001)
    integral = np.trapezoid(np.float64(eps(inner)), np.float64(rho(process, inner)))
    expected = float(alpha_s) * (np.float64(z_t) / float(alpha_t) + integral)
    np.testing.assert_allclose(z_s, expected, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize(("sampler", "options"), MULTISTEP)
def test_the_first_step_and_the_last_are_ddim(sampler, options):
    process = PROCESSES["flow"]
    for times in (TIMES[:2], np.float32([0.4, 0.0])):
        found, expected = (
            solve(q, process, exact(process), times)
            for q in (build(sampler, options), Ddim(num_steps=1))
        )
        np.testing.assert_allclose(found.z, expected.z, rtol=5e-7, atol=1e-7)
        np.testing.assert_array_equal(found.x, expected.x)
    # With a memory, the last step is DDIM's from where the others led.
    times = np.append(TIMES, np.float32(0.0))
    found = solve(build(sampler, options), process, exact(process), times)
    before = solve(build(sampler, options), process, exact(process), TIMES)
    expected = solve(
        Ddim(num_steps=1),
        process,
        exact(process),
        times[-2:],
        np.asarray(before.z),
    )
    np.testing.assert_allclose(found.z, expected.z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("deis", {"order": 1}),
        ("deis", {"order": 1, "variable": "log_rho"}),
        ("adams_bashforth", {"order": 1}),
        ("gradient_estimation", {"gamma": 1.0}),
    ],
)
def test_order_1_is_ddim(sampler, options):
    process = PROCESSES["cosine"]
    found, expected = (
        solve(q, process, exact(process)).z
        for q in (build(sampler, options), Ddim(num_steps=5))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_gradient_estimation_extrapolates():
    process = PROCESSES["flow"]
    predict = eps_of(process, lambda t: t)
    found = solve(build("gradient_estimation"), process, predict, TIMES[:4]).z
    level = np.float64(rho(process, jnp.asarray(TIMES)))
    alpha = np.float64(process.schedule.alpha_sigma(TIMES)[0])
    used = np.array([TIMES[0], 2 * TIMES[1] - TIMES[0], 2 * TIMES[2] - TIMES[1]])
    moved = np.sum(np.diff(level[:4]) * used)
    expected = alpha[3] * (Z / alpha[0] + moved)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sampler", "options"), EVERY)
def test_both_directions_are_finite_from_end_to_end(sampler, options):
    for name in ("cosine", "flow"):
        process = PROCESSES[name]
        for times in (np.linspace(0, 1, 9), np.linspace(1, 0, 9)):
            built = build(sampler, options)
            found = solve(built, process, exact(process), np.float32(times))
            assert np.all(np.isfinite(found.z)) and np.all(np.isfinite(found.x))


@pytest.mark.parametrize("sampler", ["deis", "adams_bashforth"])
@pytest.mark.parametrize("order", [0, 5])
def test_an_order_outside_its_range_is_refused(sampler, order):
    with pytest.raises(ValueError, match=r"config.sampler.order: must be in 1..4"):
        build(sampler, {"order": order})


def test_another_variable_is_refused():
    with pytest.raises(ValueError, match="variable: expected 't' or 'log_rho'"):
        build("deis", {"variable": "rho"})
