"""Guidance: off is off, the interval saves calls, and a mixture has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.guidance import base as guidance
from diffusionlab.guidance.classifier_free import ClassifierFree
from diffusionlab.guidance.clipping import ClipX
from diffusionlab.processes.gaussian import PREDICTIONS, Gaussian
from diffusionlab.samplers import base
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import DataSpec, Prediction, lift

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
SPEC = DataSpec(shape=(3,), num_classes=2)
MEAN, STD = 0.8, 0.4


def mixture(z_t, t, cond):
    """The exact prediction for classes N(-MEAN, STD²), N(MEAN, STD²); 2 is both."""
    alpha, sigma = (lift(q, z_t.ndim) for q in PROCESS.schedule.alpha_sigma(t))
    total = alpha**2 * STD**2 + sigma**2
    mean = jnp.array([-MEAN, MEAN, 0.0])[cond["label"]][:, None]
    both = MEAN * jnp.tanh(alpha * MEAN * z_t / total)
    mean = jnp.where(cond["label"][:, None] == SPEC.num_classes, both, mean)
    x = (alpha * STD**2 * z_t + sigma**2 * mean) / total
    return Prediction(x, (z_t - alpha * x) / sigma)


def example(size=6):
    z_t = jax.random.normal(jax.random.key(0), (size, 3))
    return z_t, {"label": jnp.arange(size) % 2}


def sample(transforms, cond, predict=mixture, num_steps=8):
    guided = guidance.compose(transforms, predict, PROCESS, SPEC)
    keys = jax.random.split(jax.random.key(1), cond["label"].shape[0])
    return base.sample(
        Ddim(num_steps=num_steps),
        PROCESS,
        lambda z_t, t: guided(z_t, t, cond),
        keys,
        (3,),
    )


@pytest.mark.parametrize(
    "off",
    [
        ClassifierFree(),
        ClassifierFree(guidance_scale=1.0, logsnr_min=-1.0, logsnr_max=1.0),
        ClassifierFree(guidance_scale=3.0, logsnr_min=1.0, logsnr_max=-1.0),
    ],
)
def test_scale_one_and_an_empty_interval_are_the_same_function(off):
    assert off(mixture, PROCESS, SPEC) is mixture


def test_an_interval_that_is_never_met_is_conditional():
    _, cond = example()
    never = ClassifierFree(guidance_scale=3.0, logsnr_min=50.0, logsnr_max=60.0)
    # Two compiled programs, which may round differently.
    np.testing.assert_allclose(
        sample([never], cond), sample([], cond), rtol=1e-6, atol=1e-6
    )


def test_a_full_interval_is_ordinary_guidance():
    _, cond = example()
    full = ClassifierFree(guidance_scale=3.0, logsnr_min=-50.0, logsnr_max=60.0)
    always = sample([ClassifierFree(guidance_scale=3.0)], cond)
    np.testing.assert_allclose(sample([full], cond), always, rtol=1e-6, atol=1e-6)
    assert np.abs(always - sample([], cond)).max() > 0.1


@pytest.mark.parametrize(
    ("low", "high"), [(None, None), (-2.3, 1.1), (None, 0.0), (0.0, None), (50.0, 60.0)]
)
def test_calls_are_one_per_step_and_one_more_inside_the_interval(low, high):
    sizes = []

    def counted(z_t, t, cond):
        jax.debug.callback(lambda size: sizes.append(int(size)), z_t.shape[0])
        return mixture(z_t, t, cond)

    _, cond = example(size=6)
    transform = ClassifierFree(guidance_scale=2.0, logsnr_min=low, logsnr_max=high)
    sample([transform], cond, predict=counted, num_steps=10).block_until_ready()
    jax.effects_barrier()
    logsnr = np.asarray(PROCESS.schedule.logsnr(np.arange(10, 0, -1) / 10))
    inside = (logsnr >= (low if low is not None else -np.inf)) & (
        logsnr <= (high if high is not None else np.inf)
    )
    assert len(sizes) == 10
    assert sum(sizes) == 6 * (10 + inside.sum())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guided_gaussian_classes_have_their_closed_form(t, scale):
    z_t, cond = example()
    guided = ClassifierFree(guidance_scale=scale)(mixture, PROCESS, SPEC)
    found = guided(z_t, jnp.float32(t), cond)
    alpha, sigma = (np.float64(q) for q in PROCESS.schedule.alpha_sigma(t))
    total = alpha**2 * STD**2 + sigma**2
    sign = 2 * np.asarray(cond["label"])[:, None] - 1
    z = np.float64(z_t)
    mean = MEAN * (scale * sign + (1 - scale) * np.tanh(alpha * MEAN * z / total))
    x = (alpha * STD**2 * z + sigma**2 * mean) / total
    np.testing.assert_allclose(found.x, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.eps, (z - alpha * x) / sigma, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_guidance_is_the_same_in_every_space(name):
    process = Gaussian(schedule=Cosine(), prediction=name)
    z_t, cond = example()
    null = {"label": jnp.full_like(cond["label"], 2)}
    t = jnp.float32(0.4)
    raw = [process.target(*mixture(z_t, t, c), t) for c in (cond, null)]
    in_space = process.predict(raw[1] + 3.0 * (raw[0] - raw[1]), z_t, t)
    guided = ClassifierFree(guidance_scale=3.0)(mixture, process, SPEC)
    found = guided(z_t, t, cond)
    np.testing.assert_allclose(found.x, in_space.x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.eps, in_space.eps, rtol=1e-5, atol=1e-5)


def test_a_time_per_example_is_each_example_at_its_time():
    z_t, cond = example()
    t = jnp.array([0.1, 0.3, 0.45, 0.55, 0.7, 0.9])
    transform = ClassifierFree(guidance_scale=2.0, logsnr_min=-2.3, logsnr_max=1.1)
    guided = jax.jit(transform(mixture, PROCESS, SPEC))
    together = guided(z_t, t, cond)
    for i in range(6):
        one = {"label": cond["label"][i : i + 1]}
        alone = guided(z_t[i : i + 1], t[i], one)
        np.testing.assert_allclose(together.x[i], alone.x[0], rtol=1e-6, atol=1e-6)


def test_other_conditioning_is_doubled_too():
    def predict(z_t, t, cond):
        return Prediction(z_t + cond["text"], z_t * cond["label"][:, None])

    z_t, cond = example()
    cond["text"] = jnp.ones((6, 3))
    found = ClassifierFree(guidance_scale=2.0)(predict, PROCESS, SPEC)(z_t, 0.5, cond)
    np.testing.assert_allclose(found.x, z_t + 1, rtol=1e-6)
    np.testing.assert_allclose(
        found.eps, z_t * (2 + 2.0 * (cond["label"][:, None] - 2)), atol=1e-6
    )


def test_guidance_without_classes_is_refused():
    with pytest.raises(ValueError, match="guidance_scale: 2.0 needs labels"):
        ClassifierFree(guidance_scale=2.0)(mixture, PROCESS, DataSpec(shape=(3,)))


def test_transforms_apply_one_after_the_other():
    z_t, cond = example()
    transforms = [ClassifierFree(guidance_scale=5.0), ClipX()]

    def largest(transforms):
        guided = guidance.compose(transforms, mixture, PROCESS, SPEC)
        return np.abs(guided(z_t, jnp.float32(0.5), cond).x).max()

    assert largest(transforms) == 1.0
    assert largest(transforms[::-1]) > 1.5


@pytest.mark.parametrize("t", [0.5, [0.1, 0.3, 0.45, 0.55, 0.7, 0.9]])
def test_two_passes_are_one_doubled_batch(t):
    z_t, cond = example()
    cond["key"] = jax.random.split(jax.random.key(3), 6)
    options = dict(guidance_scale=2.0, logsnr_min=-2.3, logsnr_max=1.1)
    sizes = {}

    def seen(z, time, given):
        sizes.setdefault(two_pass, []).append((z.shape[0], given["key"].shape))
        return mixture(z, time, given)

    found = []
    for two_pass in (False, True):
        transform = ClassifierFree(two_pass=two_pass, **options)
        guided = jax.jit(transform(seen, PROCESS, SPEC))
        found.append(guided(z_t, jnp.float32(t), cond))
    np.testing.assert_allclose(found[0].x, found[1].x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[0].eps, found[1].eps, rtol=1e-6, atol=1e-6)
    assert (12, (12,)) in sizes[False] and (12, (12,)) not in sizes[True]


@pytest.mark.parametrize("name", ["v", "eps", "x"])
@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaled_answer_has_the_deviation_of_the_conditional_one(name, phi):
    process = Gaussian(schedule=Flow(), prediction=name)
    z_t, cond = example()
    t = jnp.linspace(0.1, 0.9, 6)
    options = dict(guidance_scale=4.0)

    def predict(z_t, t, cond):
        x = mixture(z_t, t, cond).x
        alpha, sigma = (lift(q, 2) for q in process.schedule.alpha_sigma(t))
        return Prediction(x, (z_t - alpha * x) / sigma)

    def raw(transform):
        guided = transform(predict, process, SPEC)(z_t, t, cond)
        np.testing.assert_allclose(process.mix(*guided, t), z_t, rtol=1e-5, atol=1e-5)
        return np.asarray(process.target(*guided, t), np.float64)

    own = np.asarray(process.target(*predict(z_t, t, cond), t), np.float64)
    plain = raw(ClassifierFree(**options))
    ratio = own.std(1, keepdims=True) / plain.std(1, keepdims=True)
    found = raw(ClassifierFree(rescale=phi, **options))
    expected = phi * plain * ratio + (1 - phi) * plain
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(ratio - 1).max() > 0.1


def test_rescaling_leaves_an_example_of_one_entry_alone():
    spec = SPEC._replace(shape=(1,))
    z_t, cond = example()
    found, plain = (
        ClassifierFree(guidance_scale=3.0, rescale=r)(mixture, PROCESS, spec)(
            z_t[:, :1], jnp.float32(0.5), cond
        )
        for r in (1.0, 0.0)
    )
    np.testing.assert_allclose(found.x, plain.x, rtol=1e-5, atol=1e-6)


def test_rescale_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"rescale: must be in \[0, 1\], got 2"):
        ClassifierFree(rescale=2)
