"""Classification of noisy data: known losses, and the posterior as its minimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.objectives.noisy_classification import NoisyClassification
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.times import Uniform
from diffusionlab.types import DataSpec, Inputs, Network, lift

PROCESS = Gaussian(schedule=Flow(), prediction="v")
SPEC = DataSpec(shape=(2,), num_classes=2)
SHARES, STD = jnp.array([0.25, 0.75]), 0.4
MEANS = jnp.array([[-0.8, 0.0], [0.8, 0.3]])


def objective(apply, process=PROCESS, spec=SPEC):
    return NoisyClassification(
        process=process,
        networks={"classifier": Network(lambda key: {}, apply, ())},
        spec=spec,
        times=Uniform(),
    )


def posterior(params, z, cond, *, train=False, key=None):
    """`params` times the exact logits, for data N(MEANS[label], STD²)."""
    alpha, sigma = (lift(q, 3) for q in PROCESS.schedule.alpha_sigma(cond["t"]))
    total = alpha**2 * STD**2 + sigma**2
    fit = -0.5 * jnp.sum((z[:, None] - alpha * MEANS) ** 2 / total, -1)
    return params * (jnp.log(SHARES) + fit)


def inputs(size, key=0):
    a, b, c = jax.random.split(jax.random.key(key), 3)
    label = jax.random.categorical(a, jnp.log(SHARES), shape=(size,)).astype(jnp.int32)
    x = MEANS[label] + STD * jax.random.normal(b, (size, 2))
    return Inputs({"x": x, "label": label}, c, jnp.int32(0), {}, {})


def constant(logits):
    return lambda p, z, cond, *, train=False, key=None: jnp.broadcast_to(
        jnp.asarray(logits), (len(z), len(logits))
    )


def test_it_has_one_role_one_phase_and_nothing_to_sample():
    it = objective(constant([0.0, 0.0]))
    assert it.roles["classifier"].network == "classifier"
    assert it.phases[it.phase(7)].trains == ("classifier",) == it.samples_from
    assert not hasattr(it, "predict")


def test_equal_logits_lose_the_logarithm_of_the_classes():
    it = objective(constant([0.0] * 5), spec=SPEC._replace(num_classes=5))
    loss, _ = it.loss({"classifier": {}}, inputs(16))
    assert float(loss) == pytest.approx(np.log(5), rel=1e-6)


def test_loss_and_accuracy_are_sums_and_counts():
    it, given = objective(constant([0.0, 1.0])), inputs(100)
    loss, metrics = it.loss({"classifier": {}}, given)
    ones = float(given.batch["label"].mean())
    right, wrong = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))
    assert float(loss) == pytest.approx(ones * right + (1 - ones) * wrong, rel=1e-5)
    means = {name: np.asarray(a) / np.asarray(b) for name, (a, b) in metrics.items()
             if np.ndim(a) == 0}  # fmt: skip
    assert means["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert means["accuracy"] == pytest.approx(ones, rel=1e-6)
    for name in ("loss", "accuracy"):
        for part, whole in zip(
            metrics[f"{name}_by_logsnr"], metrics[name], strict=True
        ):
            assert float(part.sum()) == pytest.approx(float(whole), rel=1e-5)


def test_the_posterior_is_the_minimiser():
    """Among the powers of the posterior: the loss is convex in the exponent."""
    it, size = objective(posterior), 1 << 14
    given = inputs(size)
    slope = jax.jit(jax.grad(lambda a: it.loss({"classifier": a}, given)[0]))
    below, best, above = (float(slope(jnp.float32(a))) for a in (0.8, 1.0, 1.25))
    # One term of the slope is bounded by the largest difference of two logits, whose
    # mean square here is below 9; beyond 0.8 and 1.25 the slope is many times that.
    tolerance = 5 * 3 / np.sqrt(size)
    assert abs(best) < tolerance
    curvature = float(jax.jit(jax.grad(slope))(jnp.float32(1.0)))
    for found, a in ((below, 0.8), (above, 1.25)):
        assert found == pytest.approx(best + curvature * (a - 1), rel=0.5, abs=1e-3)
    assert below < 0 < above


def test_log_probs_are_normalised_and_take_a_scalar_time():
    it = objective(posterior)
    z_t = jax.random.normal(jax.random.key(0), (6, 2))
    found = it.log_probs({"classifier": 1.0}, z_t, 0.3, {})
    each = it.log_probs({"classifier": 1.0}, z_t, jnp.full(6, 0.3), {})
    np.testing.assert_allclose(jnp.exp(found).sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(found, each)


def test_the_network_sees_the_scaled_input_and_no_label():
    process = Gaussian(
        schedule=Flow(), prediction="v", sigma_data=0.5, scale_input=True
    )

    def apply(params, z, cond, *, train=False, key=None):
        assert set(cond) == {"t", "logsnr"}
        return z

    z_t = jnp.ones((3, 2)) * jnp.array([1.0, 2.0])
    found = objective(apply, process).log_probs({"classifier": {}}, z_t, 0.5, {})
    expected = jax.nn.log_softmax(process.network_input(z_t, jnp.full(3, 0.5)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_network_that_does_not_answer_logits_is_refused():
    it = objective(constant([0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"answers \(16, 3\), and must answer \(16, 2"):
        it.loss({"classifier": {}}, inputs(16))


def test_data_without_classes_are_refused():
    with pytest.raises(ValueError, match="'noisy_classification' needs labels"):
        objective(constant([0.0]), spec=DataSpec(shape=(2,)))
