"""Guidance by another run, where both runs are exact: everything is closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.guidance import base
from diffusionlab.guidance.classifier_free import ClassifierFree
from diffusionlab.guidance.clipping import DynamicThreshold
from diffusionlab.guidance.references import Autoguidance, Classifier
from diffusionlab.models import analytic
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.types import DataSpec, Prediction, lift

SPEC = DataSpec(shape=(4,), num_classes=3)
MEANS = jax.random.normal(jax.random.key(0), (3, 4))
VARIANCES = jnp.array([[0.1], [0.3], [0.2]]) * jnp.ones(4)
LOG_WEIGHTS = jnp.log(jnp.array([0.5, 0.2, 0.3]))
# One that preserves the variance, one that does not, one that lets it explode.
SCHEDULES = ("cosine", "flow", "variance_exploding")
LABEL = jnp.arange(8, dtype=jnp.int32) % 3


def process(name="cosine"):
    schedule = registry.build("schedule", {"name": name}, "config.schedule")
    return Gaussian(schedule=schedule, prediction="v")


def mixture(it, widen=1.0):
    """The exact prediction; the null label is the whole mixture."""

    def predict(z_t, t, cond):
        alpha, sigma = it.schedule.alpha_sigma(t)
        label = cond["label"][:, None]
        other = (label != jnp.arange(3)) & (label < 3)
        log_weights = jnp.where(other, -jnp.inf, LOG_WEIGHTS)
        return Prediction(
            *analytic.denoise(z_t, alpha, sigma, log_weights, MEANS, widen * VARIANCES)
        )

    return predict


def posterior(it):
    """The exact log p(y | z_t)."""

    def log_probs(z_t, t, cond):
        alpha, sigma = (lift(q, 3) for q in it.schedule.alpha_sigma(t))
        total = alpha**2 * VARIANCES + sigma**2
        offset = z_t[:, None] - alpha * MEANS
        fit = -0.5 * jnp.sum(offset**2 / total + jnp.log(total), -1)
        return jax.nn.log_softmax(LOG_WEIGHTS + fit)

    return log_probs


def noisy(it, t):
    """z_t of the first component, at a scale that fits t."""
    x, eps = jax.random.normal(jax.random.key(1), (2, 8, 4))
    return it.mix(MEANS[0] + 0.3 * x, eps, t)


@functools.cache
def guided_by_classifier(name, scale, unconditional):
    it = process(name)
    transform = Classifier(
        reference="r", classifier_scale=scale, unconditional=unconditional
    )
    return jax.jit(transform(mixture(it), it, SPEC, posterior(it)))


def close(found, expected, it, t, z_t):
    """To float32 rounding of z_t in x = (z_t - sigma eps) / alpha and in eps."""
    alpha, sigma = it.schedule.alpha_sigma(jnp.float32(t))
    size = 1.0 + jnp.abs(z_t).max()
    for q, wanted, scale in zip(found, expected, (alpha, sigma), strict=True):
        atol = 3e-6 * float(size * max(1.0, sigma / scale, 1.0 / scale))
        np.testing.assert_allclose(q, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_exact_classifier_makes_the_unconditional_denoiser_conditional(name, t):
    it = process(name)
    z_t, t = noisy(it, jnp.float32(t)), jnp.float32(t)
    found = guided_by_classifier(name, 1.0, True)(z_t, t, {"label": LABEL})
    expected = mixture(it)(z_t, t, {"label": LABEL})
    without = mixture(it)(z_t, t, {"label": jnp.full(8, 3)})
    close(found, expected, it, t, z_t)
    close((it.mix(*found, t),) * 2, (z_t, z_t), it, t, z_t)
    assert np.abs(expected.eps - without.eps).max() > 0.005


def test_exact_classifier_on_the_conditional_denoiser_is_classifier_free_guidance():
    """At the scale w - 1, for times of examples and for a scalar time."""
    it = process("flow")
    t = jnp.linspace(0.1, 0.9, 8)
    z_t, cond = noisy(it, t), {"label": LABEL}
    free = ClassifierFree(guidance_scale=3.0)(mixture(it), it, SPEC)(z_t, t, cond)
    found = guided_by_classifier("flow", 2.0, False)(z_t, t, cond)
    np.testing.assert_allclose(found.x, free.x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.eps, free.eps, rtol=1e-4, atol=1e-4)
    alone = guided_by_classifier("flow", 2.0, False)(z_t, t[3], cond)
    np.testing.assert_allclose(found.x[3], alone.x[3], rtol=1e-5, atol=1e-5)


def test_the_null_class_gets_no_gradient_of_the_classifier():
    it = process()
    z_t, cond = noisy(it, 0.5), {"label": jnp.full(8, 3)}
    found = guided_by_classifier("cosine", 1.0, False)(z_t, jnp.float32(0.5), cond)
    expected = jax.jit(mixture(it))(z_t, jnp.float32(0.5), cond)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-6, atol=1e-6)


def test_autoguidance_extrapolates_from_the_reference():
    it, t = process("flow"), jnp.linspace(0.1, 0.9, 8)
    z_t, cond = noisy(it, t), {"label": LABEL}
    strong, weak = mixture(it), mixture(it, widen=2.0)
    transform = Autoguidance(reference="r", guidance_scale=2.5)
    found = transform(strong, it, SPEC, weak)(z_t, t, cond)
    own, other = strong(z_t, t, cond), weak(z_t, t, cond)
    for q, a, b in zip(found, own, other, strict=True):
        np.testing.assert_allclose(q, 2.5 * a - 1.5 * b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(it.mix(*found, t), z_t, rtol=1e-5, atol=1e-5)
    assert np.abs(found.x - own.x).max() > 0.01


def counting(predict, calls):
    def counted(z_t, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return predict(z_t, t, cond)

    return counted


@pytest.mark.parametrize("kind", [Autoguidance, Classifier])
def test_the_reference_is_evaluated_inside_the_interval_only(kind):
    it, calls = process(), []
    scale = {Autoguidance: "guidance_scale", Classifier: "classifier_scale"}[kind]
    transform = kind(reference="r", logsnr_min=-1.0, logsnr_max=1.0, **{scale: 2.0})
    answer = {Autoguidance: mixture(it, 2.0), Classifier: posterior(it)}[kind]
    always = kind(reference="r", **{scale: 2.0})(mixture(it), it, SPEC, answer)
    guided = transform(mixture(it), it, SPEC, counting(answer, calls))
    step, cond = jax.jit(guided), {"label": LABEL}
    for t, inside in ((0.5, True), (0.1, False), (0.9, False)):
        z_t, t = noisy(it, t), jnp.float32(t)
        found = jax.block_until_ready(step(z_t, t, cond))
        jax.effects_barrier()
        expected = (always if inside else mixture(it))(z_t, t, cond)
        np.testing.assert_allclose(found.x, expected.x, rtol=1e-5, atol=1e-5)
        assert len(calls) == inside
        calls.clear()
    # With a time per example each is guided at its own.
    t = jnp.array([0.5, 0.1] * 4)
    z_t = noisy(it, t)
    found, plain = guided(z_t, t, cond), mixture(it)(z_t, t, cond)
    np.testing.assert_array_equal(found.x[1::2], plain.x[1::2])
    assert np.abs(found.x - plain.x)[::2].max() > 1e-3


@pytest.mark.parametrize(
    "off",
    [
        Autoguidance(reference="r"),
        Autoguidance(reference="r", guidance_scale=2, logsnr_min=1.0, logsnr_max=0.0),
        Classifier(reference="r"),
        Classifier(reference="r", classifier_scale=2, logsnr_min=1.0, logsnr_max=0.0),
    ],
)
def test_one_that_is_off_is_the_same_function(off):
    predict = mixture(process())
    assert off.off
    assert off(predict, process(), SPEC, None) is predict
    assert base.compose([off], predict, process(), SPEC) is predict
    assert not getattr(off, "needs_null_label", False)


@pytest.mark.parametrize("changes", [{}, {"classifier_scale": 2, "logsnr_min": 1.0}])
def test_without_a_classifier_the_prediction_stays_unconditional(changes):
    """The limit of small scales, and of short intervals."""
    off = Classifier(reference="r", unconditional=True, logsnr_max=0.0, **changes)
    it, t = process(), jnp.float32(0.5)
    z_t = noisy(it, t)
    assert off.off and off.needs_null_label
    found = base.compose([off], mixture(it), it, SPEC)(z_t, t, {"label": LABEL})
    expected = mixture(it)(z_t, t, {"label": jnp.full(8, 3)})
    np.testing.assert_array_equal(found.eps, expected.eps)
    # There is no label to leave out of data without classes.
    predict = mixture(it)
    assert off(predict, it, DataSpec(shape=(4,)), None) is predict


def test_a_classifier_needs_classes():
    it = Classifier(reference="r", classifier_scale=2.0)
    with pytest.raises(ValueError, match="classifier_scale: 2.0 needs labels"):
        it(mixture(process()), process(), DataSpec(shape=(4,)), None)


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("interval", [None, 0.0])
def test_all_together_are_one_formula_after_the_other(two_pass, interval):
    """Classifier-free, then autoguidance, then the classifier, then the threshold."""
    it, t = process("flow"), jnp.float32(0.45)
    z_t, cond = noisy(it, t), {"label": LABEL}
    guided = base.compose(
        [
            ClassifierFree(guidance_scale=2.0, two_pass=two_pass, logsnr_min=interval),
            Autoguidance(reference="r", guidance_scale=1.5, logsnr_min=interval),
            Classifier(reference="c", classifier_scale=0.5),
            DynamicThreshold(quantile=0.7),
        ],
        mixture(it),
        it,
        SPEC,
        [None, mixture(it, 2.0), posterior(it), None],
    )
    found = jax.jit(guided)(z_t, t, cond)
    own, null = (mixture(it)(z_t, t, {"label": q}) for q in (LABEL, jnp.full(8, 3)))
    weak = mixture(it, 2.0)(z_t, t, cond)
    # The classifier adds half of the difference once more.
    x = 1.5 * (2 * own.x - null.x) - 0.5 * weak.x + 0.5 * (own.x - null.x)
    s = np.maximum(np.quantile(np.abs(x), 0.7, axis=1, keepdims=True), 1.0)
    x = np.clip(x, -s, s) / s
    alpha, sigma = it.schedule.alpha_sigma(t)
    np.testing.assert_allclose(found.x, x, rtol=1e-4, atol=2e-5)
    eps = (z_t - alpha * x) / sigma
    np.testing.assert_allclose(found.eps, eps, rtol=1e-4, atol=5e-5)
    assert (s > 1.01).any()
