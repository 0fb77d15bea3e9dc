"""The exact denoisers against matrices, quadrature and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.data.generated import Generated, Mixture
from diffusionlab.models import analytic, network
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.variance_exploding import VarianceExploding
from diffusionlab.types import DataSpec

SOURCE = Mixture(dimension=3, num_components=4, std=0.4, size=512)
PROCESS = Gaussian(schedule=Flow(), prediction="v")
LEVELS = [(0.9, 0.3), (0.5, 0.5), (0.1, 1.0), (1.0, 3.0)]


def build(name, process=PROCESS, source=SOURCE, dtype="float32", spec=None, **options):
    context = {"spec": spec or source.spec, "dtype": dtype}
    context |= {"process": process, "source": source}
    module = registry.build(
        "network", {"name": name, **options}, "config.networks.x", **context
    )
    return network.as_network(module, context["spec"])


@functools.cache
def answer(name, process=PROCESS, t=0.6, label=None, **options):
    """z_t and the prediction of a network for it."""
    net = build(name, process, **options)
    z_t = jax.random.normal(jax.random.key(1), (8, 3))
    t = jnp.full(8, t)
    label = jnp.full(8, SOURCE.num_components if label is None else label)

    @jax.jit
    def predict(z_t):
        cond = {"t": t, "logsnr": process.schedule.logsnr(t), "label": label}
        params = net.init(jax.random.key(0))
        raw = net.apply(params, process.network_input(z_t, t), cond)
        return process.predict(raw, z_t, t)

    return z_t, predict(z_t)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_a_mixture_in_one_dimension_is_its_quadrature(alpha, sigma):
    means, std, weights = np.array([-1.0, 0.3, 2.0]), 0.3, np.array([0.2, 0.5, 0.3])
    x = np.linspace(-4, 6, 4001)
    density = weights @ np.exp(-((x - means[:, None]) ** 2) / (2 * std**2))
    z = np.linspace(-3, 3, 13)
    joint = density * np.exp(-((z[:, None] - alpha * x) ** 2) / (2 * sigma**2))
    # The trapezoidal rule is exponentially accurate for smooth functions on a line.
    expected = (joint @ x) / joint.sum(1)
    found_x, found_eps = analytic.denoise(
        jnp.float32(z)[:, None],
        alpha,
        sigma,
        np.log(weights),
        means[:, None],
        np.full((3, 1), std**2),
    )
    np.testing.assert_allclose(found_x[:, 0], expected, atol=2e-6)
    np.testing.assert_allclose(
        found_eps[:, 0], (z - alpha * expected) / sigma, atol=1e-5
    )


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_a_gaussian_with_a_basis_is_its_matrix_formula(alpha, sigma):
    rng = np.random.default_rng(0)
    root, mean = rng.normal(size=(4, 4)), rng.normal(size=4)
    covariance = root @ root.T
    values, vectors = np.linalg.eigh(covariance)
    z = rng.normal(size=(5, 4))
    gain = (
        alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(4))
    )
    expected = mean + (z - alpha * mean) @ gain.T
    found, eps = analytic.denoise(
        jnp.float32(z),
        jnp.full(5, alpha),
        jnp.full(5, sigma),
        np.zeros(1),
        mean[None],
        values[None],
        jnp.float32(vectors)[None],
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(alpha * found + sigma * eps, z, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale_input", [True, False])
def test_the_answer_is_the_same_in_every_space(prediction, scale_input):
    process = Gaussian(
        schedule=VarianceExploding(),
        prediction=prediction,
        sigma_data=0.7,
        scale_input=scale_input,
    )
    z_t, found = answer("gaussian_mixture", process)
    alpha, sigma = process.schedule.alpha_sigma(0.6)
    x, eps = analytic.denoise(
        z_t,
        alpha,
        sigma,
        np.log(SOURCE.weights),
        SOURCE.means,
        np.full(SOURCE.means.shape, SOURCE.std**2),
    )
    # An eps of order one is told through x, and divided by sigma = 1.7, and back.
    np.testing.assert_allclose(found.x, x, atol=1e-5)
    np.testing.assert_allclose(found.eps, eps, atol=1e-5)


def test_a_label_chooses_the_component_and_null_is_their_mixture():
    z_t, found = answer("gaussian_mixture", label=2)
    alpha, sigma = PROCESS.schedule.alpha_sigma(0.6)
    total = alpha**2 * SOURCE.std**2 + sigma**2
    mean = SOURCE.means[2]
    gain = alpha * SOURCE.std**2 / total
    np.testing.assert_allclose(found.x, mean + gain * (z_t - alpha * mean), atol=2e-6)
    _, null = answer("gaussian_mixture")
    assert np.abs(null.x - found.x).max() > 0.1


def test_means_given_in_the_config_are_those_of_the_source():
    means = tuple(map(tuple, SOURCE.means))
    _, given = answer("gaussian_mixture", means=means, std=SOURCE.std)
    np.testing.assert_allclose(given.x, answer("gaussian_mixture")[1].x, atol=1e-6)


def moments(label=None):
    x = np.stack([SOURCE[i]["x"] for i in range(len(SOURCE))]).astype(np.float64)
    if label is not None:
        x = x[[SOURCE[i]["label"] == label for i in range(len(SOURCE))]]
    return x.mean(0), np.cov(x, rowvar=False, bias=True)


@pytest.mark.parametrize("per_class", [False, True])
def test_a_fitted_gaussian_is_the_best_affine_denoiser(per_class):
    label = 1 if per_class else None
    z_t, found = answer("gaussian", label=label, per_class=per_class)
    mean, covariance = moments(label)
    alpha, sigma = (np.float64(q) for q in PROCESS.schedule.alpha_sigma(0.6))
    total = alpha**2 * covariance + sigma**2 * np.eye(3)
    gain = alpha * covariance @ np.linalg.inv(total)
    expected = mean + (np.float64(z_t) - alpha * mean) @ gain.T
    np.testing.assert_allclose(found.x, expected, atol=5e-6)


def test_a_fit_has_the_shares_of_the_classes():
    weights, means, variances, bases = analytic.fit(SOURCE, 4)
    labels = [SOURCE[i]["label"] for i in range(len(SOURCE))]
    np.testing.assert_allclose(weights, np.bincount(labels) / len(SOURCE), rtol=1e-6)
    assert means.shape == variances.shape == (4, 3) and bases.shape == (4, 3, 3)
    mean, covariance = moments(3)
    np.testing.assert_allclose(means[3], mean, atol=1e-6)
    rebuilt = bases[3] * variances[3] @ bases[3].T
    np.testing.assert_allclose(rebuilt, covariance, atol=1e-6)


def test_a_gaussian_with_a_std_is_affine():
    z_t, found = answer("gaussian", mean=0.3, std=0.5)
    alpha, sigma = PROCESS.schedule.alpha_sigma(0.6)
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    np.testing.assert_allclose(found.x, 0.3 + gain * (z_t - 0.3 * alpha), atol=2e-6)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_mixture"])
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), VarianceExploding()])
def test_both_ends_are_finite(name, schedule):
    process = Gaussian(schedule=schedule, prediction="eps")
    for t in (0.0, 1.0):
        _, found = answer(name, process, t=t)
        assert np.all(np.isfinite(found.x)) and np.all(np.isfinite(found.eps))
    # All noise: what is left is the mean of the data, or nearly so.
    mean = SOURCE.means.mean(0) if name == "gaussian_mixture" else moments()[0]
    alpha, sigma = schedule.alpha_sigma(1.0)
    assert np.abs(found.x - mean).max() <= 10 * float(alpha / sigma) ** 0.5


def test_any_other_parameters_have_a_larger_error():
    net = build("gaussian_mixture")
    truth = jax.jit(net.init)(jax.random.key(0))
    size = 1 << 13
    keys = jax.random.split(jax.random.key(3), 3)
    label = jax.random.randint(keys[0], (size,), 0, 4)
    x = SOURCE.means[label] + SOURCE.std * jax.random.normal(keys[1], (size, 3))
    t = jnp.linspace(0.2, 0.9, size)
    z_t, eps = PROCESS.corrupt(keys[2], x, t)

    @jax.jit
    def errors(params):
        raw = net.apply(params, z_t, {"t": t, "label": jnp.full(size, 4)})
        return jnp.mean((PROCESS.predict(raw, z_t, t).eps - eps) ** 2, axis=1)

    others = {
        "means": jnp.full((4, 3), 0.2),
        "log_variances": jnp.full((4, 3), 0.7),
        "log_weights": jnp.array([1.0, 0.0, 0.0, 0.0]),
    }
    assert set(others) == set(truth)
    for name, change in others.items():
        for sign in (1, -1):
            moved = truth | {name: truth[name] + sign * change}
            excess = np.float64(errors(moved) - errors(truth))
            assert excess.mean() > 3 * excess.std() / size**0.5, (name, sign)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gaussian_mixture", {"dtype": "bfloat16"}, "config.precision.compute"),
        ("gaussian", {"dtype": "bfloat16"}, "config.precision.compute"),
        (
            "gaussian_mixture",
            {"source": Generated(shape=(2, 2, 1), size=8)},
            "needs means and std",
        ),
        ("gaussian_mixture", {"std": 0.3}, "x.std: is taken from the data"),
        ("gaussian_mixture", {"means": ((0.0, 0.0, 0.0),) * 4}, "x.std: must be posit"),
        ("gaussian_mixture", {"means": ((0.0,) * 3,), "std": 1.0}, "1 of them for 4"),
        ("gaussian_mixture", {"means": ((0.0,) * 2,) * 4, "std": 1.0}, "of 3 numbers"),
        (
            "gaussian_mixture",
            {"means": ((0.0,) * 3,) * 4, "std": 1.0, "weights": (0.5, 0.5)},
            r"x.weights: expected 4 positive numbers, .* got \(0.5, 0.5\)",
        ),
        ("gaussian", {"std": 0.0}, "config.networks.x.std: must be positive"),
        ("gaussian", {"std": -0.5}, "config.networks.x.std: must be positive"),
        ("gaussian", {"floor": -1.0}, "config.networks.x.floor: must not be"),
        (
            "gaussian",
            {"spec": DataSpec((65, 64)), "source": SOURCE},
            "at most 4096 dimensions, got 4160",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        build(name, **options)


class Sorted:
    """25,000 scalars, each its class: the first 5,000 are of 0, the next of 1, ..."""

    spec = DataSpec((1,), 5)

    def __len__(self):
        return 25_000

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"x": np.float32([index // 5000]), "label": index // 5000}


def test_a_fit_of_a_sorted_source_sees_all_of_it():
    weights, means, _, _ = analytic.fit(Sorted(), 5)
    np.testing.assert_allclose(weights, 0.2)
    np.testing.assert_allclose(means[:, 0], np.arange(5))
    _, (mean,), (variance,), _ = analytic.fit(Sorted(), 0)
    assert (mean, variance) == (2.0, 2.0)
    with pytest.raises(ValueError, match="no example of class 5 among 10000"):
        analytic.fit(Sorted(), 6)
