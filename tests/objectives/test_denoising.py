"""The denoising objective with networks simple enough to know the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.objectives import weightings
from diffusionlab.objectives.denoising import (
    Denoising,
    denoising_error,
    loss_by_logsnr,
    pool,
)
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.discrete_beta import DiscreteBeta
from diffusionlab.schedules.times import Discrete, LogitNormal, Uniform
from diffusionlab.types import DataSpec, Inputs, Network

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
SPEC = DataSpec(shape=(4, 4, 1), num_classes=3)
BIAS = {"sigmoid": {"bias": -1.0}, "sigmoid_uniform": {"bias": -1.0}}
WEIGHTINGS = [
    registry.build("weighting", {"name": name} | BIAS.get(name, {}), "config")
    for name in registry.table("weighting")
]
SCHEDULES = [
    {"name": name}
    | {
        "shifted_cosine": {"resolution": 64, "reference": 32},
        "interpolated_cosine": {"resolution": 64, "low": 16, "high": 64},
        "edm": {"preserving": False},
    }.get(name, {})
    for name in registry.table("schedule")
    if not name.startswith("alpha_")
]


def zero(params, z, cond, *, train=False, key=None):
    return jnp.zeros_like(z)


def objective(apply=zero, **changes):
    arguments = {
        "process": PROCESS,
        "networks": {"denoiser": Network(lambda key: {}, apply, ())},
        "spec": SPEC,
        "weighting": weightings.Eps(),
        "times": Uniform(),
    }
    return Denoising(**(arguments | changes))


def run(it, given, params=None):
    """The loss under jit: eager, it would be a hundred small compilations."""
    return jax.jit(it.loss)({"denoiser": params or {}}, given)


def inputs(batch_size, shape=SPEC.shape, key=0, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(100 + key), (batch_size, *shape), dtype)
    label = jnp.arange(batch_size, dtype=jnp.int32) % 3
    batch = {"x": x, "label": label}
    return Inputs(batch, jax.random.key(key), jnp.int32(0), {}, {})


def test_it_has_one_role_and_one_phase():
    it = objective()
    assert it.roles["denoiser"].network == "denoiser"
    assert it.phases["train"].trains == ("denoiser",)
    assert it.phase(7) == "train"
    assert set(it.samples_from) <= set(it.roles)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [(weightings.Eps(), 0.5), (weightings.Sigmoid(bias=-2.0), 0.156518)],
)
def test_a_zero_network_has_the_known_loss_on_unit_gaussian_data(weighting, expected):
    it = objective(weighting=weighting)
    loss, metrics = run(it, inputs(1 << 14))
    # Given t, a term is factor * chi-squared: relative standard error below
    # (2 / pixels)^0.5 times the spread of the factor over t, here less than 3.
    tolerance = 5 * 3 * (2 / (1 << 18)) ** 0.5
    assert float(loss) == pytest.approx(expected, rel=tolerance)
    # v itself has variance one.
    v_mse = metrics["v_mse"][0] / metrics["v_mse"][1]
    assert float(v_mse) == pytest.approx(1.0, rel=tolerance)


def test_metrics_add_up_to_the_loss():
    it = objective()
    loss, metrics = run(it, inputs(64))
    total, count = metrics["loss"]
    assert float(total / count) == pytest.approx(float(loss), rel=1e-6)
    sums, counts = metrics["loss_by_logsnr"]
    assert sums.shape == counts.shape == (10,)
    assert float(counts.sum()) == 64.0
    assert float(sums.sum()) == pytest.approx(float(total), rel=1e-6)


def test_loss_is_binned_by_logsnr_and_clipped():
    logsnr = jnp.array([-20.0, -15.0, -0.1, 0.1, 14.9, 15.0, 40.0])
    sums, counts = loss_by_logsnr(jnp.arange(1.0, 8.0), logsnr)
    np.testing.assert_array_equal(counts, [2, 0, 0, 0, 1, 1, 0, 0, 0, 3])
    np.testing.assert_array_equal(sums, [3, 0, 0, 0, 3, 4, 0, 0, 0, 18])


@pytest.mark.parametrize("block", SCHEDULES, ids=lambda block: block["name"])
def test_every_loss_and_its_gradient_are_finite_at_both_ends_of_time(block):
    """Of every prediction, under every weighting: one program, `[P, W, 2]`."""
    schedule = registry.build("schedule", block, "config.schedule")
    of = dict(schedule=schedule, scale_input=True)
    processes = [Gaussian(prediction=prediction, **of) for prediction in PREDICTIONS]
    t = jnp.array([0.0, 1.0])
    x = jnp.ones((2, 3), jnp.bfloat16)
    eps = 2 * x

    def losses(process, raw):
        error = denoising_error(process, x, eps, raw, t)
        return jnp.stack([weighting(schedule, t) * error for weighting in WEIGHTINGS])

    @jax.jit
    def of_all(raw):
        pairs = zip(processes, raw, strict=True)
        return jnp.stack([losses(process, each) for process, each in pairs])

    @jax.jit
    def slopes_of_all(raw):
        pairs = zip(processes, raw, strict=True)
        return jnp.stack(
            [jax.jacrev(losses, argnums=1)(process, each) for process, each in pairs]
        )

    start = jnp.zeros((len(PREDICTIONS), 2, 3))
    found = of_all(start.astype(jnp.bfloat16))
    assert found.dtype == jnp.float32 and np.all(np.isfinite(found)), found
    slopes = np.asarray(slopes_of_all(start)).reshape(len(PREDICTIONS), -1)
    assert np.all(np.isfinite(slopes)) and np.all(np.any(slopes != 0, axis=1))
    target = jnp.stack([process.target(x, eps, t) for process in processes])
    # The compiled loss may round its own target otherwise than the eager one.
    size = of_all(target + 1e-6 * (1 + jnp.abs(target)))
    assert np.all(np.asarray(of_all(target)) <= size)


@pytest.mark.parametrize("as_uniform", [True, False])
def test_the_importance_weight_multiplies_the_loss(as_uniform):
    law = LogitNormal(mean=0.5, std=2.0, as_uniform=as_uniform)
    loss, _ = run(objective(times=law), inputs(1 << 12))
    t, weight = law.sample(jax.random.fold_in(jax.random.key(0), 0), 1 << 12, None)
    alpha, _ = PROCESS.schedule.alpha_sigma(t)
    terms = np.float64(weight * alpha**2)
    nodes, density = np.polynomial.hermite_e.hermegauss(40)
    at_nodes = 1 / (1 + np.exp(-0.5 - 2.0 * nodes))
    plain = density @ np.cos(np.pi / 2 * at_nodes) ** 2 / density.sum()
    expected = 0.5 if as_uniform else plain
    assert terms.mean() == pytest.approx(expected, abs=2e-3)
    # Given t, a term is terms * chi-squared / pixels of 16 pixels.
    error = 5 * (2 / 16 * (terms**2).mean() / terms.size) ** 0.5
    assert float(loss) == pytest.approx(terms.mean(), abs=error)


@pytest.mark.parametrize(
    ("rate", "low", "high"), [(0, 0, 0), (1, 1, 1), (0.1, 0.07, 0.13)]
)
def test_labels_are_dropped_to_the_null_class(rate, low, high):
    seen = []

    def capture(params, z, cond, *, train, key):
        assert train and key is not None
        seen.append(cond)
        return jnp.zeros_like(z)

    given = inputs(4096, shape=(1,))
    it = objective(
        capture, spec=DataSpec(shape=(1,), num_classes=3), label_dropout=rate
    )

    @jax.jit
    def conditioning(given):
        it.loss({"denoiser": {}}, given)
        return seen[0]

    cond = conditioning(given)
    label = np.asarray(cond["label"])
    dropped = label == 3
    # 0.03 is more than six standard errors at 4096 labels.
    assert low <= dropped.mean() <= high
    np.testing.assert_array_equal(label[~dropped], given.batch["label"][~dropped])
    assert cond["t"].shape == cond["logsnr"].shape == (4096,)


def test_data_without_classes_need_no_label():
    seen = []

    def capture(params, z, cond, *, train, key):
        seen.append(set(cond))
        return jnp.zeros_like(z)

    it = objective(capture, spec=DataSpec(shape=SPEC.shape))
    given = inputs(8)
    jax.eval_shape(
        it.loss, {"denoiser": {}}, given._replace(batch={"x": given.batch["x"]})
    )
    assert seen == [{"t", "logsnr"}]


def test_the_loss_is_a_function_of_the_key():
    it = objective()
    loss = jax.jit(lambda given: it.loss({"denoiser": {}}, given)[0])
    first = loss(inputs(64))
    assert first == loss(inputs(64))
    assert first != loss(inputs(64)._replace(key=jax.random.key(9)))


def test_gradients_reach_the_parameters_and_stay_float32():
    def scaled(params, z, cond, *, train=False, key=None):
        return (params["scale"] * z).astype(jnp.bfloat16)

    it = objective(scaled)
    params = {"denoiser": {"scale": jnp.float32(0.5)}}
    grad, _ = jax.jit(jax.grad(it.loss, has_aux=True))(params, inputs(256))
    # For unit gaussian data the best v is zero, so the scale wants to shrink.
    assert grad["denoiser"]["scale"] > 0


@pytest.mark.parametrize("t", [0.3, [0.3, 0.6]])
def test_predict_conditions_on_time_per_example(t):
    seen = []

    def capture(params, z, cond, *, train=False, key=None):
        assert not train and key is None
        seen.append(cond)
        return params["bias"] * jnp.ones_like(z)

    z_t = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    label = jnp.array([0, 3])
    params = {"denoiser": {"bias": 0.5}}
    found = objective(capture).predict(params, z_t, jnp.array(t), {"label": label})
    t = np.broadcast_to(np.float32(t), (2,))
    np.testing.assert_array_equal(seen[0]["t"], t)
    np.testing.assert_array_equal(seen[0]["logsnr"], PROCESS.schedule.logsnr(t))
    np.testing.assert_array_equal(seen[0]["label"], label)
    raw = jnp.full_like(z_t, 0.5)
    np.testing.assert_array_equal(found.x, PROCESS.predict(raw, z_t, t).x)


def test_pooling_averages_windows():
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        pool(images, 2)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]]
    )


def test_multiscale_error_of_a_white_residual():
    # The expectation over white residuals of variance one is the sum over unit
    # impulses, and all impulses have the same error: side² times that of one.
    process = Gaussian(schedule=Cosine(), prediction="eps")
    places = jnp.array([0, 63, 1000, 4095])
    impulses = jax.nn.one_hot(places, 64 * 64).reshape(-1, 64, 64, 1)
    zeros, t = jnp.zeros_like(impulses), jnp.full(4, 0.5)

    def error(*scales):
        return 64**2 * denoising_error(process, zeros, impulses, zeros, t, scales)

    np.testing.assert_allclose(error(32, 64), 0.0234375, rtol=1e-6)
    np.testing.assert_allclose(error(64), error() / 64, rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pooling_the_residual_is_the_difference_of_the_pooled(prediction):
    process = Gaussian(schedule=Cosine(), prediction=prediction)
    keys = jax.random.split(jax.random.key(0), 3)
    x, eps, raw = (jax.random.normal(key, (5, 8, 8, 2)) for key in keys)
    t = jnp.linspace(0.3, 0.7, 5)
    eps_hat = process.predict(raw, process.mix(x, eps, t), t).eps
    expected = sum(
        ((pool(eps, side) - pool(eps_hat, side)) ** 2).mean((1, 2, 3)) / side
        for side in (2, 8)
    )
    found = denoising_error(process, x, eps, raw, t, (2, 8))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_the_multiscale_loss_is_trained_and_the_v_error_reported():
    spec = DataSpec(shape=(4, 4, 1))
    plain, plain_metrics = run(objective(spec=spec), inputs(64))
    it = objective(spec=spec, scales=(4,))
    scaled, metrics = run(it, inputs(64))
    assert float(scaled) == pytest.approx(float(plain) / 4, rel=1e-6)
    assert metrics["v_mse"] == plain_metrics["v_mse"]


@pytest.mark.parametrize(
    "changes",
    [
        {"label_dropout": 1.5},
        {"label_dropout": -0.1},
        {"scales": (2,)},
        {"scales": (3, 4)},
        {"scales": (4,), "spec": DataSpec(shape=(4,))},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match="^(label_dropout|scales): "):
        objective(**changes)


def test_a_network_of_another_shape_is_refused():
    def wide(params, z, cond, *, train=False, key=None):
        return jnp.zeros((*z.shape[:-1], 2))

    with pytest.raises(ValueError, match="config.networks.denoiser"):
        objective(wide).loss({"denoiser": {}}, inputs(2))


def test_two_standard_deviations_of_the_data_are_refused():
    process = Gaussian(schedule=Cosine(), prediction="edm", sigma_data=0.5)
    with pytest.raises(ValueError, match=r"^weighting\.sigma_data: is 1\.0.*has 0\.5"):
        objective(process=process, weighting=weightings.Edm())
    objective(process=process, weighting=weightings.Edm(sigma_data=0.5))


def test_times_of_another_chain_are_refused():
    process = Gaussian(schedule=DiscreteBeta(num_timesteps=100), prediction="eps")
    message = r"^times\.num_timesteps: is 1000, but the schedule's chain has 100"
    with pytest.raises(ValueError, match=message):
        objective(process=process, times=Discrete())
    objective(process=process, times=Discrete(num_timesteps=100))
