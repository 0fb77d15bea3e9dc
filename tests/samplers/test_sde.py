"""The reverse SDE on gaussian data: one step, its moments, and what is refused."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import gaussian

from diffusionlab import registry
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, grids, sde, stability
from diffusionlab.samplers.sde import EulerMaruyama, PredictorCorrector
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.linear_beta import LinearBeta
from diffusionlab.types import DataSpec, Prediction

COSINE = Gaussian(schedule=Cosine(), prediction="v")
FLOW = Gaussian(schedule=Flow(), prediction="v")
SPEC = DataSpec((4,))
MEAN, STD = 0.3, 0.5


def build(name, num_steps, **options):
    block = {"name": name, "num_steps": num_steps, **options}
    return registry.build("sampler", block, "config.sampler")


def scales(process, t):
    return np.float64(process.schedule.alpha_sigma(jnp.float32(t)))


@functools.cache
def step(predictor, process):
    """`(z, t, s) -> mean, scale` of a predictor for data N(MEAN, STD²), vectorised."""

    def one(z, t, s):
        return predictor(process, gaussian(process, MEAN, STD)(z, t), z, t, s)

    return jax.jit(jax.vmap(one))


@pytest.mark.parametrize("process", [COSINE, FLOW])
def test_a_step_of_euler_maruyama_is_that_of_the_reverse_sde(process):
    """f and g from differences of alpha and logsnr, the score from the density."""
    z = np.array([-1.0, 0.5, 2.0, 0.1])
    t, s = np.array([0.9, 0.6, 0.4, 0.1]), np.array([0.85, 0.5, 0.1, 0.05])
    mean, scale = step(sde.euler_maruyama, process)(z, t, s)
    alpha, sigma = scales(process, t)
    h = 1e-3
    (a_0, s_0), (a_1, s_1) = scales(process, t - h), scales(process, t + h)
    f = (np.log(a_1) - np.log(a_0)) / (2 * h)
    # g² = d sigma² / dt - 2 f sigma², another form of -sigma² logsnr'.
    g = np.sqrt((s_1**2 - s_0**2) / (2 * h) - 2 * f * sigma**2)
    score = -(z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    expected = z - (t - s) * (f * z - g**2 * score)
    # Differences are exact to h²; alpha and sigma have six digits over 2 h.
    np.testing.assert_allclose(mean, expected, rtol=5e-4, atol=2e-4)
    np.testing.assert_allclose(scale, g * np.sqrt(t - s), rtol=5e-4)


@pytest.mark.parametrize("predictor", [sde.euler_maruyama, *sde.PREDICTORS.values()])
@pytest.mark.parametrize("process", [COSINE, FLOW])
def test_mean_and_variance_converge_at_first_order(predictor, process):
    errors = []
    for num_steps in (200, 400):
        times = np.linspace(0.8, 0.1, num_steps + 1, dtype=np.float32)
        t, s = times[:-1], times[1:]
        offset, scale = map(np.float64, step(predictor, process)(0.0 * t, t, s))
        with_one, _ = map(np.float64, step(predictor, process)(0.0 * t + 1.0, t, s))
        (alpha, end), (sigma, last) = scales(process, times[[0, -1]])
        mean, variance = alpha * MEAN, alpha**2 * STD**2 + sigma**2
        for a, b, c in zip(with_one - offset, offset, scale, strict=True):
            mean, variance = a * mean + b, a**2 * variance + c**2
        true = end**2 * STD**2 + last**2
        errors.append([mean - end * MEAN, variance - true])
    errors = np.abs(errors)
    assert np.all(errors[0] < 0.02)
    # A mean that is already exact, as the ancestral one, has no order to measure.
    measured = errors[0] > 1e-5
    assert measured[1]
    ratio = errors[0] / np.maximum(errors[1], 1e-12)
    np.testing.assert_allclose(np.log2(ratio[measured]), 1.0, atol=0.1)


def test_reverse_diffusion_is_the_published_step_for_discrete_betas():
    process = Gaussian(schedule=LinearBeta(), prediction="v")
    z, t, s = (jnp.array([q], jnp.float32) for q in (0.7, 0.5, 0.45))
    (a_t, a_s), _ = scales(process, [0.5, 0.45])
    beta = 1.0 - (a_t / a_s) ** 2
    prediction = gaussian(process, MEAN, STD)(z, t)
    mean, scale = sde.reverse_diffusion(process, prediction, z, t, s)
    _, sigma = scales(process, 0.5)
    score = -np.float64(prediction.eps) / sigma
    expected = (2.0 - np.sqrt(1.0 - beta)) * 0.7 + beta * score
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_allclose(scale, np.sqrt(beta), rtol=1e-5)


@pytest.mark.parametrize("process", [COSINE, FLOW])
def test_a_langevin_step_is_the_published_one(process):
    z, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    t, s = jnp.float32(0.6), jnp.float32(0.5)
    prediction = gaussian(process, MEAN, STD)(z, s)
    found = sde.langevin(process, prediction, z, t, s, 0.16, noise)
    (a_t, a_s), (_, sigma) = scales(process, [0.6, 0.5])
    z, noise, score = map(np.float64, (z, noise, -prediction.eps / np.float32(sigma)))
    for i in range(3):
        norms = np.linalg.norm(noise[i]) / np.linalg.norm(score[i])
        e = 2 * (a_t / a_s) ** 2 * (0.16 * norms) ** 2
        expected = z[i] + e * score[i] + np.sqrt(2 * e) * noise[i]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


def test_a_langevin_step_without_a_score_is_the_longest():
    z, noise = jax.random.normal(jax.random.key(0), (2, 3, 4))
    prediction = Prediction(z, 0.0 * z)
    s = jnp.float32(0.5)
    found = sde.langevin(COSINE, prediction, z, jnp.float32(0.6), s, 0.16, noise)
    _, sigma = COSINE.schedule.alpha_sigma(s)
    np.testing.assert_allclose(found, z + 2**0.5 * sigma * noise, rtol=1e-5)


def test_the_corrector_alone_goes_to_the_variance_of_the_process():
    """With steps of a fixed ratio of norms, z has variance V / (1 - small)."""
    t, s, size = jnp.float32(0.55), jnp.float32(0.5), 1 << 12
    alpha, sigma = scales(COSINE, 0.5)
    true = alpha**2 * STD**2 + sigma**2
    predict = gaussian(COSINE, 0.0, STD)
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def chain(z):
        def body(z, i):
            noise = base.normal(base.fold(keys, i), z.shape[1:])
            return sde.langevin(COSINE, predict(z, s), z, t, s, 0.3, noise), None

        return jax.lax.scan(body, z, jnp.arange(150))[0]

    z = chain(jnp.zeros((4, size)).at[1].set(4.0))
    # Stationary: v = keep² v + 4 q² sigma², with |eps| = sigma v^½ / V, so the step
    # e = 2 q² sigma² leaves v = V / (1 - e / 2V): what Langevin adds for a finite step.
    (a_t, a_s), _ = scales(COSINE, [0.55, 0.5])
    variance = true
    for _ in range(100):
        e = 2 * (a_t / a_s * 0.3) ** 2 * true**2 / variance
        variance = (1 - e / true) ** 2 * variance + 2 * e
    # Four chains of 4096 entries each; what one loses by chance is regained slowly.
    found = np.asarray(jnp.mean(z**2, axis=1))
    np.testing.assert_allclose(found, variance, rtol=6 * (2 / size) ** 0.5)
    assert variance / true > 1.03


def variances(sampler, process):
    """Ratio at each stop, the noise of the steps replaced by independent entries."""
    keys = jax.random.split(jax.random.key(0), 1)
    shape, found = (1, 1 << 13), []
    predict = gaussian(process)
    times = sampler.times(process.schedule)

    @jax.jit
    def run(z):
        def body(carry, step):
            z, i = carry
            t, s = step
            ratio = jnp.mean(z**2) / stability.true_variance(process, t)
            state = sampler.init(z, t)
            z = sampler.step(process, predict, state, t, s, base.fold(keys, i)).z
            return (z, i + 1), ratio

        return jax.lax.scan(body, (z, 1), (times[:-1], times[1:]))[1]

    found = run(process.prior_from(keys, shape[1:]))
    return np.asarray(found)


@pytest.mark.parametrize(
    "sampler",
    [
        EulerMaruyama(num_steps=12, grid=grids.Logsnr()),
        PredictorCorrector(num_steps=12),
        PredictorCorrector(
            num_steps=12, predictor="reverse_diffusion", num_corrector=2
        ),
    ],
)
def test_the_stability_check_computes_the_variance_of_the_steps(sampler):
    with mock.patch.object(stability, "refuse") as refuse:
        sampler.check(COSINE, SPEC)
    expected = refuse.call_args.args[0]
    assert len(expected) == 12 and np.ptp(expected) > 0.05
    # 8192 entries; a factor blows up what chance has left in the steps before it.
    found = variances(sampler, COSINE)
    np.testing.assert_allclose(found, expected, rtol=6 * (2 / 8192) ** 0.5)


@pytest.mark.parametrize(
    ("schedule", "grid", "stable"),
    [
        ("cosine", "uniform", False),
        ("cosine", "logsnr", True),
        ("cosine", "rho", True),
        ("linear_beta", "uniform", True),
        ("edm", "uniform", True),
        ("flow", "uniform", False),
        ("flow", "logsnr", True),
    ],
)
def test_euler_maruyama_is_refused_where_it_blows_up(schedule, grid, stable):
    schedule = registry.build("schedule", {"name": schedule}, "config.schedule")
    process = Gaussian(schedule=schedule, prediction="v")
    sampler = build("euler_maruyama", 100, grid={"name": grid})
    if stable:
        sampler.check(process, SPEC)
    else:
        with pytest.raises(ValueError, match=r"num_steps: 100 steps .* times the true"):
            sampler.check(process, SPEC)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("num_corrector", [0, 2])
def test_evaluations_are_as_many_as_stated(num_steps, num_corrector):
    calls = []

    def predict(z_t, t):
        calls.append(float(t))
        return Prediction(0.5 * z_t, 0.5 * z_t)

    sampler = PredictorCorrector(num_steps=num_steps, num_corrector=num_corrector)
    keys, z = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 3))
    with jax.disable_jit():
        state = base.solve(
            sampler, FLOW, predict, z, grids.Uniform()(None, num_steps), keys
        )
    assert len(calls) == sampler.num_evaluations
    # The result is of the last predictor's evaluation.
    assert calls[-1] == pytest.approx(1 / num_steps)
    assert np.all(np.isfinite(state.x))
    assert EulerMaruyama(num_steps=num_steps).num_evaluations == num_steps


def test_without_a_corrector_the_ancestral_predictor_is_ancestral_sampling():
    keys = jax.random.split(jax.random.key(0), 2)
    z, t, s = jnp.ones((2, 3)), jnp.float32(0.5), jnp.float32(0.4)
    predict = gaussian(FLOW, MEAN, STD)
    found, expected = (
        build(name, 4, **more).step(FLOW, predict, base.State(z, z), t, s, keys)
        for name, more in (
            ("predictor_corrector", {"num_corrector": 0}),
            ("ancestral", {"noise_exponent": 0.0}),
        )
    )
    noise = base.normal(base.fold(keys, 0), (3,)), base.normal(keys, (3,))
    scale = np.sqrt(np.float32(FLOW.posterior(predict(z, t), z, t, s)[1]))
    np.testing.assert_allclose(
        found.z - scale * noise[0], expected.z - scale * noise[1], atol=1e-6
    )
    np.testing.assert_array_equal(found.x, expected.x)


def test_corrector_steps_use_their_own_noise():
    keys = jax.random.split(jax.random.key(0), 2)
    z, t, s = jnp.zeros((2, 3)), jnp.float32(0.5), jnp.float32(0.4)
    with mock.patch.object(base, "normal", wraps=base.normal) as normal:
        with jax.disable_jit():
            build("predictor_corrector", 4, num_corrector=2).step(
                FLOW, gaussian(FLOW, MEAN, STD), base.State(z, z), t, s, keys
            )
        used = [
            jax.random.key_data(call.args[0]).tolist() for call in normal.mock_calls
        ]
    assert len(used) == 3
    assert len({str(keys) for keys in used}) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("predictor", "heun"),
        ("num_corrector", -1),
        ("signal_to_noise", -0.1),
    ],
)
def test_a_field_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"config.sampler.{field}: "):
        build("predictor_corrector", **({"num_steps": 2} | {field: value}))
