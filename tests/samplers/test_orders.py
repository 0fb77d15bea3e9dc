"""The order of every registered sampler, measured in double precision.

A grid that ends at t = 0.1 never takes the step to clean data, so the latent shows what
the scheme does. Under cosine the data are N(0.3, 0.5²), where the ODE has the solution

    z_s = alpha_s m + sqrt(V_s / V_t) (z_t - alpha_t m),  V = alpha² d² + sigma²    (1)

and under flow a mixture of two gaussians, whose ODE is not linear. The stochastic
samplers are measured on (1) without random numbers: z is affine in the noise of every
step, so its variance is the sum of the squares of what unit impulses leave at the end.
"""

import contextlib
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.processes import gaussian
from diffusionlab.samplers import base
from diffusionlab.schedules import base as schedule_base
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import Prediction

COSINE, FLOW = Cosine(), Flow()
MEAN, STD = 0.3, 0.5
START, END = 0.9, 0.1
NUM_STEPS = (96, 192)
POINTS = np.array([-1.5, -0.4, 0.8, 2.0])[:, None]

# name -> (options, order of the ODE solver); theory for smooth eps_hat or x_hat, after
# first steps short enough not to count. UniPC's corrector adds one to its predictor.
# aDDIM and a covariance of eta 0 are DDIM to leading order.
ORDERS = {
    "addim": [({"numerator": 0.0}, 1), ({}, 1)],
    "adams_bashforth": [({"order": k}, k) for k in (1, 2, 3, 4)],
    "covariance": [({"eta": 0.0}, 1)],
    "ddim": [({}, 1)],
    "deis": [
        *(({"order": k}, k) for k in (1, 2, 3, 4)),
        ({"order": 3, "variable": "log_rho"}, 3),
    ],
    "dpm_solver_1s": [({}, 1)],
    "dpm_solver_2m": [({}, 2)],
    "dpm_solver_2s": [({}, 2)],
    "dpm_solver_3m": [({}, 3), ({"published": True}, 2)],
    "euler": [({}, 1)],
    "gradient_estimation": [({}, 1), ({"gamma": 1.0}, 1)],
    "heun": [({}, 2)],
    "restart": [({"restarts": ()}, 2)],
    "runge_kutta_4": [({}, 4)],
    "unipc": [
        *(({"order": k}, k + 1) for k in (1, 2, 3)),
        ({"order": 2, "variant": "bh1"}, 3),
    ],
}

# name -> (options, weak order of the mean, of the variance). None is exact: where the
# noise is that of the process, x_hat does not move along the conditional mean.
WEAK = {
    "ancestral": [({"noise_exponent": g}, None, 1) for g in (0.0, 0.3, 1.0)],
    "ddim": [({"eta": 1.0}, None, 1)],
    "dpm_solver_1s": [({"eta": 1.0}, None, 1)],
    "dpm_solver_2m": [({"eta": 1.0}, None, 2)],
    # Two independent noises per step instead of one path would make it 1.
    "dpm_solver_2s": [({"eta": 1.0}, None, 2)],
    # The noise of earlier steps is in the differences: order 3 is the ODE's alone.
    "dpm_solver_3m": [({"eta": 1.0}, None, 2)],
    "euler_maruyama": [({}, 1, 1)],
    # Its Langevin steps have a length, and an error, that do not shrink with N.
    "predictor_corrector": [
        ({"num_corrector": 0}, None, 1),
        ({"num_corrector": 0, "predictor": "reverse_diffusion"}, 1, 1),
    ],
}

# Its accuracy is an option, not an order.
ADAPTIVE = {"probability_flow"}


def cases(table):
    return [(name, *case) for name, found in sorted(table.items()) for case in found]


@contextlib.contextmanager
def double():
    """Schedules, processes and noise compute in float64 inside."""

    def wide(q):
        return jnp.asarray(q, jnp.float64)

    with (
        jax.enable_x64(True),
        mock.patch.object(schedule_base, "float32", wide),
        mock.patch.object(gaussian, "_float32", lambda *q: tuple(map(wide, q))),
    ):
        yield


def one_gaussian(process, z_t, t):
    alpha, sigma = process.schedule.alpha_sigma(t)
    total = alpha**2 * STD**2 + sigma**2
    centred = z_t - alpha * MEAN
    return Prediction(MEAN + alpha * STD**2 * centred / total, sigma * centred / total)


def mixture_eps(alpha, sigma, z, numpy):
    """eps_hat for 0.3 N(-1, 0.4²) + 0.7 N(1, 0.6²)."""
    totals = [alpha**2 * std**2 + sigma**2 for std in (0.4, 0.6)]
    centred = [z + alpha, z - alpha]
    odds = np.log(0.3 / 0.7) + 0.5 * numpy.log(totals[1] / totals[0])
    odds = odds + centred[1] ** 2 / (2 * totals[1]) - centred[0] ** 2 / (2 * totals[0])
    first = 1.0 / (1.0 + numpy.exp(-odds))
    slopes = [d / v for d, v in zip(centred, totals, strict=True)]
    return sigma * (first * slopes[0] + (1.0 - first) * slopes[1])


def two_gaussians(process, z_t, t):
    alpha, sigma = process.schedule.alpha_sigma(t)
    eps = mixture_eps(alpha, sigma, z_t, jnp)
    return Prediction((z_t - sigma * eps) / alpha, eps)


DATA = {COSINE: one_gaussian, FLOW: two_gaussians}


def moments(schedule, t):
    alpha, sigma = map(float, schedule.alpha_sigma(t))
    return alpha, alpha**2 * STD**2 + sigma**2


@functools.cache
def exact(schedule):
    """The latents at END of the ODE from POINTS at START; by (1), or in numpy."""
    if schedule is COSINE:
        (alpha_t, v_t), (alpha_s, v_s) = (moments(schedule, q) for q in (START, END))
        return alpha_s * MEAN + np.sqrt(v_s / v_t) * (POINTS - alpha_t * MEAN)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        map(float, schedule.alpha_sigma(q)) for q in (START, END)
    )

    def slope(log_rho, y):  # alpha = 1 / (1 + rho), sigma = 1 - alpha
        rho = np.exp(log_rho)
        alpha = 1.0 / (1.0 + rho)
        return rho * mixture_eps(alpha, 1.0 - alpha, alpha * y, np)

    times, y = (
        np.linspace(np.log(sigma_t / alpha_t), np.log(sigma_s / alpha_s), 1001),
        (POINTS / alpha_t),
    )
    h = times[1] - times[0]
    for time in times[:-1]:
        k1 = slope(time, y)
        k2 = slope(time + h / 2, y + h / 2 * k1)
        k3 = slope(time + h / 2, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(time + h, y + h * k3))
    return alpha_s * y


def build(name, options):
    block = {"name": name, "num_steps": 2, **options}
    return registry.build("sampler", block, "config.sampler")


def uniform(num_steps):
    return np.linspace(START, END, num_steps + 1)


def graded(num_steps, order):
    """Equal steps after short ones: of order 1, 2, 3, their errors are h^order."""
    h = (START - END) / num_steps
    short = [h ** max(1.0, (order + 1) / (k + 2)) / 2 for k in range(3)]
    times = START - np.cumsum([0.0, *short])
    return np.append(times, np.linspace(times[-1], END, num_steps + 1)[1:])


def walk(sampler, process, data, grids, z=POINTS, noises=None):
    """The latents that the sampler leaves at the end of every grid."""
    keys = jax.random.split(jax.random.key(0), len(z))

    @jax.jit
    def step(state, t, s, noise):
        draws = itertools.chain(noise, itertools.repeat(jnp.zeros_like(state.z)))
        with mock.patch.object(base, "normal", lambda keys, shape: next(draws)):
            predict = functools.partial(data, process)
            return sampler.step(process, predict, state, t, s, keys)

    for grid in grids:
        grid = np.asarray(grid, np.float64)
        state = sampler.init(jnp.asarray(z), jnp.asarray(grid[0]))
        for i in range(len(grid) - 1):
            noise = () if noises is None else noises(len(grid) - 1, i)
            state = step(state, grid[i], grid[i + 1], noise)
        yield np.asarray(state.z)


def slope(errors):
    return np.log2(errors[0] / errors[1])


def errors(name, options, schedule, grids):
    process = gaussian.Gaussian(schedule=schedule, prediction="v")
    with double():
        reference = exact(schedule)
        sampler = build(name, options)
        return [
            np.abs(z - reference).max()
            for z in walk(sampler, process, DATA[schedule], grids)
        ]


def test_every_registered_sampler_has_an_order():
    # 'consistency' adds fresh noise to answers: it has no order. Nor have tokens.
    known = {*ORDERS} | {*WEAK} | ADAPTIVE | {"consistency"}
    names = registry.table("sampler")
    assert {name for name in names if not name.startswith("token_")} == known


@pytest.mark.parametrize("schedule", [COSINE, FLOW], ids=["cosine", "flow"])
@pytest.mark.parametrize(("name", "options", "order"), cases(ORDERS))
def test_order(name, options, order, schedule):
    grids = [graded(n, order) for n in NUM_STEPS]
    found = slope(errors(name, options, schedule, grids))
    # The next order is still there: the slopes approach theirs like 1 / N.
    assert order - 0.3 < found < order + 0.3


@pytest.mark.parametrize("name", ["deis", "adams_bashforth"])
def test_equal_steps_after_a_first_one_of_order_1_have_order_2(name):
    grids = [uniform(n) for n in (384, 768)]
    found = slope(errors(name, {"order": 4}, FLOW, grids))
    assert found == pytest.approx(2.0, abs=0.2)


def test_gradient_estimation_of_three_halves_has_order_2_in_rho():
    def grid(num_steps):
        rho = [np.exp(-0.5 * float(FLOW.logsnr(t))) for t in (START, END)]
        stops = np.linspace(*rho, num_steps + 1)
        return np.asarray(FLOW.inverse(-2.0 * np.log(stops)))

    with double():
        grids = [grid(n) for n in NUM_STEPS]
        process = gaussian.Gaussian(schedule=FLOW, prediction="v")
        ab2 = build("adams_bashforth", {"order": 2})
        bar = build("gradient_estimation", {"gamma": 1.5})
        found = [list(walk(q, process, two_gaussians, grids)) for q in (ab2, bar)]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-10)


def weak_errors(name, options, num_steps):
    """Errors at END of E[z | z at START] and of the variance, by unit impulses."""
    process = gaussian.Gaussian(schedule=COSINE, prediction="v")
    grid = graded(num_steps, 3)
    draws = 2 * (len(grid) - 1)
    with double():
        (alpha_t, v_t), (alpha_s, v_s) = (moments(COSINE, q) for q in (START, END))
        z = np.full((2 + draws, 1), alpha_t * MEAN)
        z[1] += v_t**0.5

        def impulses(count, i):
            # Two draws of a step at most; row 0 gets none, row 1 starts elsewhere.
            rows = np.zeros((2, 2 + draws, 1))
            rows[0, 2 + i], rows[1, 2 + count + i] = 1.0, 1.0
            return tuple(rows)

        (z,) = walk(build(name, options), process, one_gaussian, [grid], z, impulses)
    left = z[1:, 0] - z[0, 0]
    # For eta = 1 the steps are those of the forward process, reversed: z at START and
    # at END have the covariance v_s alpha_t / alpha_s.
    kept = alpha_t / alpha_s * v_s / v_t**0.5
    return np.abs([left[0] - kept, np.sum(left**2) - v_s])


@pytest.mark.parametrize(("name", "options", "mean", "variance"), cases(WEAK))
def test_weak_order(name, options, mean, variance):
    coarse, fine = (weak_errors(name, options, n) for n in (64, 128))
    if mean is None:
        assert max(coarse[0], fine[0]) < 1e-12
    else:
        assert mean - 0.3 < slope([coarse[0], fine[0]]) < mean + 0.3
    assert variance - 0.3 < slope([coarse[1], fine[1]]) < variance + 0.5
