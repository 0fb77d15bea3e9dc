"""DPM-Solver++ against DDIM, ancestral sampling and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import gaussian

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.variance_exploding import VarianceExploding
from diffusionlab.types import Prediction

NAMES = ("dpm_solver_1s", "dpm_solver_2s", "dpm_solver_2m", "dpm_solver_3m")
SCHEDULES = {"cosine": Cosine(), "flow": Flow(), "exploding": VarianceExploding()}
PROCESSES = {
    name: Gaussian(schedule=schedule, prediction="v")
    for name, schedule in SCHEDULES.items()
}
TIMES = np.float32([0.9, 0.7, 0.55, 0.3, 0.2])


def build(name, **options):
    block = {"name": name, "num_steps": 4, **options}
    return registry.build("sampler", block, "config.sampler")


def constant_x(process, x=0.7):
    def predict(z_t, t):
        alpha, sigma = process.schedule.alpha_sigma(t)
        return Prediction(jnp.full_like(z_t, x), (z_t - alpha * x) / sigma)

    return predict


def latents(sampler, process, predict, times=TIMES):
    keys = jax.random.split(jax.random.key(0), 3)
    z = jnp.float32([[-1.2, 0.4], [0.1, 2.0], [0.8, -0.3]])
    return np.asarray(
        jax.jit(lambda z: base.solve(sampler, process, predict, z, times, keys).z)(z)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_1s_is_ddim_and_its_sde_is_ancestral_sampling(schedule):
    process = PROCESSES[schedule]
    run = functools.partial(
        latents, process=process, predict=gaussian(process, 0.3, 0.5)
    )
    ode = run(build("dpm_solver_1s"))
    np.testing.assert_allclose(ode, run(Ddim(num_steps=4)), rtol=2e-5, atol=2e-6)
    sde = run(build("dpm_solver_1s", eta=1.0))
    for same in (Ddim(num_steps=4, eta=1.0), Ancestral(num_steps=4, noise_exponent=0)):
        np.testing.assert_allclose(sde, run(same), rtol=2e-5, atol=2e-6)
    assert np.abs(sde - ode).min() > 1e-3


def test_eta_of_ddim_counts_variance_and_this_one_time():
    process = PROCESSES["flow"]
    times = np.float32([0.8, 0.5])
    h = float(base.half_logsnr_step(process, *times))
    same = ((1.0 - np.exp(-2.0 * 0.6 * h)) / (1.0 - np.exp(-2.0 * h))) ** 0.5
    found = [
        latents(sampler, process, gaussian(process, 0.3, 0.5), times)
        for sampler in (build("dpm_solver_1s", eta=0.6), Ddim(num_steps=1, eta=same))
    ]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("times", [TIMES[:2], np.float32([0.4, 0.0])])
def test_the_first_step_and_the_last_are_of_order_1(name, eta, times):
    process = PROCESSES["cosine"]
    found = [
        latents(build(q, eta=eta), process, gaussian(process, 0.3, 0.5), times)
        for q in (name, "dpm_solver_1s")
    ]
    np.testing.assert_allclose(*found, rtol=5e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_point_mass_is_exact_in_any_number_of_steps(name, schedule):
    process = PROCESSES[schedule]
    predict = constant_x(process)
    found = latents(build(name), process, predict)
    direct = latents(Ddim(num_steps=1), process, predict, TIMES[[0, -1]])
    np.testing.assert_allclose(found, direct, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_latents_of_a_point_mass_have_the_variance_of_the_process(name):
    """The noise of the SDE is right whatever its eta: var z_s = sigma_s²."""
    process = PROCESSES["flow"]
    z = jax.random.normal(jax.random.key(1), (1 << 14, 2), jnp.float32)
    alpha, sigma = (q[:, None] for q in process.schedule.alpha_sigma(TIMES[[0, -1]]))
    keys = jax.random.split(jax.random.key(0), len(z))
    sampler = build(name, eta=0.7)
    state = base.solve(
        sampler,
        process,
        constant_x(process),
        alpha[0] * 0.7 + sigma[0] * z,
        TIMES,
        keys,
    )
    eps = (np.asarray(state.z) - alpha[1] * 0.7) / sigma[1]
    # 2^15 numbers: the standard error of a variance is sqrt(2 / 2^15) = 0.008.
    assert eps.var() == pytest.approx(1.0, abs=0.04)
    assert eps.mean() == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize(
    ("num_steps", "variance"), [(2, 0.2525), (4, 0.6490), (8, 0.9314), (16, 0.9928)]
)
def test_variance_of_unit_gaussian_data(num_steps, variance):
    """Equal steps of the untruncated cosine, with logsnr clipped at both ends."""
    schedule = Cosine(logsnr_min=-12.0, logsnr_max=12.0)
    angle = np.pi / 2 * np.arange(num_steps, -1, -1) / num_steps
    with np.errstate(divide="ignore"):
        logsnr = -2.0 * np.log(np.tan(angle))
    times = np.array(schedule.inverse(np.clip(logsnr, -12.0, 12.0)))
    times[[0, -1]] = 1.0, 0.0
    process = Gaussian(schedule=schedule, prediction="v")
    sampler = build("dpm_solver_2m", num_steps=num_steps)
    state = base.solve(
        sampler,
        process,
        gaussian(process),
        jnp.ones((1, 1)),
        times,
        jax.random.split(jax.random.key(0), 1),
    )
    assert float(state.z[0, 0]) ** 2 == pytest.approx(variance, abs=5e-5)


def test_3m_integrates_a_parabola_in_logsnr():
    """Past its first two steps, the published weight does not."""
    process = PROCESSES["flow"]
    logsnr = process.schedule.logsnr

    def predict(z_t, t):
        half = 0.5 * logsnr(t)
        return Prediction(jnp.full_like(z_t, 1.0 + 0.3 * half - 0.2 * half**2), z_t)

    start = [latents(build("dpm_solver_3m"), process, predict, TIMES[:3])]
    end = {
        published: latents(
            build("dpm_solver_3m", published=published), process, predict, TIMES[:4]
        )
        for published in (False, True)
    }
    t, s = TIMES[2], TIMES[3]
    (_, sigma_t), (alpha_s, sigma_s) = map(process.schedule.alpha_sigma, (t, s))
    low, high = (0.5 * float(logsnr(q)) for q in (t, s))
    half = np.linspace(low, high, 20001)
    inside = np.exp(half - high) * (1.0 + 0.3 * half - 0.2 * half**2)
    integral = np.trapezoid(inside, half)
    expected = float(sigma_s / sigma_t) * start[0] + float(alpha_s) * integral
    np.testing.assert_allclose(end[False], expected, rtol=1e-5, atol=2e-6)
    # Half of int e^(..) u² du times the second difference.
    assert np.abs(end[True] - expected).min() > 1e-3


def test_noise_of_2s_is_one_path():
    """x_hat of the middle knows a half of the step's noise: see tests of orders."""
    process = PROCESSES["cosine"]
    seen = []

    def predict(z_t, t):
        seen.append((z_t, t))
        return constant_x(process, 0.0)(z_t, t)

    keys = jax.random.split(jax.random.key(0), 1 << 12)
    sampler = build("dpm_solver_2s", eta=1.0)
    z = jnp.zeros((1 << 12, 1))
    with jax.disable_jit():
        times = np.float32([0.8, 0.4])
        end = np.asarray(base.solve(sampler, process, predict, z, times, keys).z)
    (_, _), (middle, t) = seen
    _, sigma_t = process.schedule.alpha_sigma(t)
    _, sigma_s = process.schedule.alpha_sigma(times[1])
    # Of the reverse SDE at x_hat = 0: cov(z_s, z_m) = (sigma_s / sigma_m) e^-h var z_m.
    h = float(base.half_logsnr_step(process, t, times[1]))
    expected = float(sigma_s / sigma_t) * np.exp(-h)
    middle = np.asarray(middle)
    slope = (end * middle).sum() / (middle**2).sum()
    error = (end - expected * middle).std() / (middle.std() * len(end) ** 0.5)
    assert slope == pytest.approx(expected, abs=5 * error)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_eta_is_refused(name):
    with pytest.raises(ValueError, match="config.sampler.eta: must be at least 0"):
        build(name, eta=-0.1)
