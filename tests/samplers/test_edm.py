"""EDM's samplers on gaussian data, where every step is a known factor."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import flow_map, gaussian

from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, edm, grids
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.samplers.edm import Euler, Heun
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import DataSpec, Prediction

COSINE = Gaussian(schedule=Cosine(), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="v")
MEAN, STD = 0.3, 0.5
KEYS = jax.random.split(jax.random.key(0), 3)
Z = jnp.array([[-1.5], [0.2], [2.0]])


@functools.cache
def program(sampler, process, mean=MEAN, std=STD):
    """`(z, times) -> state`, compiled once for a number of times."""
    predict = gaussian(process, mean, std)
    return jax.jit(lambda z, t: base.solve(sampler, process, predict, z, t, KEYS))


def reference(process, z, times, mean=MEAN, std=STD, order=2):
    """Algorithm 1 in y = z / alpha and S = sigma / alpha, in float64."""
    alpha, sigma = np.float64(process.schedule.alpha_sigma(jnp.float32(times)))
    level = sigma / alpha
    y = np.float64(z) / alpha[0]

    def slope(y, level):
        return (y - (y * std**2 + level**2 * mean) / (std**2 + level**2)) / level

    for i in range(len(times) - 1):
        span = level[i + 1] - level[i]
        first = slope(y, level[i])
        after = y + span * first
        if order == 2:
            after = y + span * (first + slope(after, level[i + 1])) / 2
        y = after
    return alpha[-1] * y


@pytest.mark.parametrize("process", [COSINE, FLOW])
@pytest.mark.parametrize(("sampler", "order"), [(Euler, 1), (Heun, 2)])
def test_steps_are_those_of_the_algorithm(sampler, order, process):
    times = np.linspace(0.95, 0.1, 6, dtype=np.float32)
    state = program(sampler(num_steps=5), process)(Z, times)
    expected = reference(process, Z, times, order=order)
    np.testing.assert_allclose(state.z, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("process", [COSINE, FLOW])
@pytest.mark.parametrize(("sampler", "order"), [(Euler, 1), (Heun, 2)])
def test_the_error_of_the_latent_falls_with_the_order(sampler, order, process):
    errors = []
    for n in (16, 32):
        times = np.linspace(0.8, 0.1, n + 1, dtype=np.float32)
        state = program(sampler(num_steps=n), process)(Z, times)
        errors.append(np.abs(state.z - flow_map(process, Z, 0.8, 0.1, MEAN, STD)).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("sampler", "tolerance"), [(Euler, 0.08), (Heun, 4e-3)])
def test_inversion_and_back_is_the_identity_but_for_the_steps(sampler, tolerance):
    # Up and down differ at each step by its local error: 64 steps of length 0.015, an
    # error of first and of second order. Measured: 0.064, 0.0023.
    down = np.linspace(0.95, 0.0, 65, dtype=np.float32)
    solve = program(sampler(num_steps=64), COSINE)
    up = solve(Z, down[::-1]).z
    np.testing.assert_allclose(
        up, flow_map(COSINE, Z, 0.0, 0.95, MEAN, STD), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(solve(up, down).z, Z, atol=tolerance)


@pytest.mark.parametrize(("num_steps", "ratio"), [(4, 15.1), (8, 1.69), (16, 1.12)])
def test_heun_overshoots_unit_gaussian_data_on_its_own_grid(num_steps, ratio):
    # The grid ends at 0.002 and then goes to 0, so the schedule must reach further.
    process = Gaussian(schedule=Edm(sigma_min=1e-5), prediction="v")
    sampler = Heun(num_steps=num_steps, grid=grids.Rho(sigma_min=0.002, sigma_max=80.0))
    times = sampler.times(process.schedule)
    x = program(sampler, process, 0.0, 1.0)(Z / Z, times).x
    np.testing.assert_allclose(np.square(x), ratio, rtol=4e-3)


def test_euler_is_ddim():
    times = grids.Uniform()(None, 7)
    euler = program(Euler(num_steps=7), COSINE)(Z, times)
    ddim = program(Ddim(num_steps=7), COSINE)(Z, times)
    np.testing.assert_array_equal(euler.z, ddim.z)
    np.testing.assert_array_equal(euler.x, ddim.x)


def test_heun_ends_with_the_x_of_an_euler_step():
    z, t = jnp.ones((3, 1)), jnp.float32(0.3)
    heun, euler = (
        s.step(
            COSINE, gaussian(COSINE, MEAN, STD), s.init(z, t), t, jnp.float32(0), KEYS
        )
        for s in (Heun(num_steps=1), Euler(num_steps=1))
    )
    np.testing.assert_array_equal(heun.z, euler.z)
    np.testing.assert_array_equal(heun.x, gaussian(COSINE, MEAN, STD)(z, t).x)


@pytest.mark.parametrize("sampler", [Euler, Heun])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_evaluations_are_as_many_as_stated(sampler, num_steps):
    calls = []

    def predict(z_t, t):
        calls.append(float(t))
        return Prediction(0.5 * z_t, 0.5 * z_t)

    built = sampler(num_steps=num_steps, churn=0.3)
    with jax.disable_jit():
        base.solve(built, COSINE, predict, Z, grids.Uniform()(None, num_steps), KEYS)
    assert len(calls) == built.num_evaluations
    assert built.num_evaluations == (
        num_steps if sampler is Euler else 2 * num_steps - 1
    )


def test_churn_outside_its_levels_changes_nothing():
    times = grids.Uniform()(None, 6)
    plain = program(Heun(num_steps=6), COSINE)(Z, times)
    limits = [dict(churn=0.0), dict(churn=3.0, churn_min=1e4)]
    for limit in [*limits, dict(churn=3.0, churn_max=1e-5)]:
        state = program(Heun(num_steps=6, **limit), COSINE)(Z, times)
        # Without churn it is the same program.
        tolerance = 1e-6 if limit["churn"] else 0.0
        np.testing.assert_allclose(state.x, plain.x, rtol=tolerance, atol=tolerance)


def test_steps_outside_the_levels_of_churn_get_no_noise_at_all():
    """Where the level is raised by nothing but rounding, the root of it is 1e-3."""
    schedule, t = mock.Mock(wraps=Edm()), jnp.float32(0.5)
    logsnr = Edm().logsnr(t)
    # The same time twice, compiled into two programs that round differently.
    schedule.logsnr.side_effect = [logsnr, logsnr - 1e-6 * abs(logsnr)]
    sampler = Euler(num_steps=1, churn=0.3, churn_min=1e4)
    process = mock.Mock(schedule=schedule)
    z, raised = edm.raise_noise(sampler, process, Z, t, KEYS)
    assert schedule.logsnr.call_count == 2
    np.testing.assert_array_equal(raised, t)
    np.testing.assert_array_equal(z, Z)


def test_without_churn_no_noise_is_drawn():
    drawn = mock.Mock(side_effect=AssertionError)
    with mock.patch.object(base, "normal", drawn):
        for sampler in (Euler(num_steps=2), Heun(num_steps=2)):
            state = sampler.init(Z, jnp.float32(1))
            t, s = jnp.float32(0.6), jnp.float32(0.3)
            sampler.step(COSINE, gaussian(COSINE, MEAN, STD), state, t, s, KEYS)


@pytest.mark.parametrize("process", [COSINE, FLOW])
@pytest.mark.parametrize("churn", [0.5, 100.0])
def test_churn_keeps_the_variance_of_the_process(process, churn):
    """From q(z_t) the raised latent is from q at the raised time, for data N(0, d²)."""
    sampler = Euler(num_steps=10, churn=churn, churn_max=50.0)

    def raised(z, t):
        with mock.patch.object(base, "normal", lambda keys, shape: jnp.ones((1, 1))):
            z, later = edm.raise_noise(sampler, process, z, t, KEYS[:1])
        return z[0, 0], later

    t = jnp.linspace(0.02, 1.0, 30)
    run = jax.jit(jax.vmap(raised, (None, 0)))
    noise, later = run(jnp.zeros((1, 1)), t)
    both, _ = run(jnp.ones((1, 1)), t)
    alpha, sigma = np.float64(process.schedule.alpha_sigma(t))
    alpha_s, sigma_s = np.float64(process.schedule.alpha_sigma(later))
    level, after = sigma / alpha, sigma_s / alpha_s
    gamma = np.where(level <= 50, min(churn / 10, np.sqrt(2) - 1), 0.0)
    inside = (1 + gamma) * level < 0.99 * level[-1]
    # Times are float32: 6e-8 near t = 1, where alpha is 0.0005, and 50 is the limit.
    np.testing.assert_allclose(after[inside], ((1 + gamma) * level)[inside], rtol=1e-3)
    np.testing.assert_array_equal(later[gamma == 0], t[gamma == 0])
    factor, scale = np.float64(both - noise), np.float64(noise)
    for std in (0.0, 0.5, 1.0):
        before = alpha**2 * std**2 + sigma**2
        expected = alpha_s**2 * std**2 + sigma_s**2
        np.testing.assert_allclose(factor**2 * before + scale**2, expected, rtol=1e-5)


def test_churned_noise_is_limited_to_the_end_of_the_schedule():
    sampler = Euler(num_steps=1, churn=1.0)
    z, t = edm.raise_noise(sampler, COSINE, Z, jnp.float32(1), KEYS)
    assert float(t) == 1.0
    np.testing.assert_array_equal(z, Z)


def test_noise_scale_multiplies_the_added_noise():
    added = []
    for scale in (1.0, 1.5):
        sampler = Euler(num_steps=4, churn=1.0, noise_scale=scale)
        added.append(edm.raise_noise(sampler, FLOW, 0.0 * Z, jnp.float32(0.5), KEYS)[0])
    np.testing.assert_allclose(added[1], 1.5 * added[0], rtol=1e-6)


def variances(sampler, process):
    """Of the latent at every stop, for N(0, STD²) data, by the factors of the steps."""
    times = sampler.times(process.schedule)

    def latent(z, t, s):
        state = sampler.init(jnp.full((1, 1), z), t)
        predict = gaussian(process, 0.0, STD)
        return sampler.step(process, predict, state, t, s, KEYS[:1]).z[0, 0]

    with mock.patch.object(base, "normal", lambda keys, shape: jnp.ones((1, 1))):
        step = jax.jit(jax.vmap(jax.value_and_grad(latent), (None, 0, 0)))
        scale, factor = (np.float64(q) for q in step(0.0, times[:-1], times[1:]))
    alpha, sigma = np.float64(process.schedule.alpha_sigma(jnp.float32(1)))
    found = [alpha**2 + sigma**2]
    for a, b in zip(factor, scale, strict=True):
        found.append(a**2 * found[-1] + b**2)
    return np.array(found)


def test_churned_samples_have_the_variance_of_the_recursion():
    sampler = Heun(num_steps=12, churn=4.0, grid=grids.Rho())
    keys = jax.random.split(jax.random.key(1), 16)
    predict = gaussian(COSINE, 0.0, STD)
    x = jax.jit(lambda k: base.sample(sampler, COSINE, predict, k, (4096,)))(keys)
    expected = variances(sampler, COSINE)[-1]
    assert float(x.var()) == pytest.approx(expected, rel=5 * (2 / x.size) ** 0.5)
    # Four times the steps leave a sixteenth of Heun's error: churn adds none to it.
    errors = [
        variances(Heun(num_steps=n, churn=10.0, grid=grids.Rho()), COSINE)[-1] - STD**2
        for n in (100, 400)
    ]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.3)
    assert abs(errors[0]) < 0.05 * STD**2


def test_unstable_steps_are_refused_and_stable_ones_are_not():
    spec = DataSpec((4,))
    with pytest.raises(ValueError, match="num_steps: .* unstable: .* 20.9 times"):
        Heun(num_steps=10).check(COSINE, spec)
    Heun(num_steps=10, grid=grids.Rho()).check(COSINE, spec)
    Heun(num_steps=1).check(COSINE, spec)


@pytest.mark.parametrize("sampler", [Euler, Heun])
@pytest.mark.parametrize(
    ("field", "value"),
    [("churn", -1.0), ("churn_min", -1.0), ("noise_scale", 0.0), ("num_steps", 0)],
)
def test_a_field_out_of_range_is_refused(sampler, field, value):
    with pytest.raises(ValueError, match=f"{field}: "):
        sampler(**({"num_steps": 2} | {field: value}))
    with pytest.raises(ValueError, match="churn_min: .*got 2.0 and 1.0"):
        sampler(num_steps=2, churn_min=2.0, churn_max=1.0)
