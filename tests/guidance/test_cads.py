"""Noise on labels: how much, of which moments, for whom, and heard by the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.guidance import base
from diffusionlab.guidance.cads import Cads, LabelNoise, Uses
from diffusionlab.guidance.classifier_free import ClassifierFree
from diffusionlab.guidance.references import Autoguidance
from diffusionlab.models.mlp import MLP
from diffusionlab.models.network import as_network
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import DataSpec, Prediction

PROCESS = Gaussian(schedule=Flow(), prediction="v")
SPEC = DataSpec(shape=(3,), num_classes=4)
NULL = 4
KEYS = jax.random.split(jax.random.key(5), 6)
LABEL = jnp.arange(6, dtype=jnp.int32) % 4


@functools.cache
def predict():
    """Of a small network, away from the zeros it starts with."""
    net = as_network(MLP(spec=SPEC, dtype="float32", width=16, num_layers=1), SPEC)
    waves = lambda p: jnp.sin(7.0 * jnp.arange(p.size).reshape(p.shape))  # noqa: E731
    params = jax.tree.map(lambda p: p + 0.5 * waves(p), net.init(jax.random.key(0)))

    def call(z_t, t, cond):
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z_t.shape[:1])
        cond = {**cond, "t": t, "logsnr": PROCESS.schedule.logsnr(t)}
        return PROCESS.predict(net.apply(params, z_t, cond), z_t, t)

    return call


@functools.cache
def run(*transforms):
    return jax.jit(base.compose(transforms, predict(), PROCESS, SPEC))


def x(*transforms, t=0.95, label=LABEL, keys=KEYS):
    z_t = jax.random.normal(jax.random.key(1), (6, 3))[: len(label)]
    cond = {"label": label, "key": keys}
    return np.asarray(run(*transforms)(z_t, jnp.float32(t), cond).x)


def test_what_is_kept_falls_from_one_to_zero_between_the_two_times():
    t = np.array([0.0, 0.6, 0.675, 0.75, 0.9, 1.0], np.float32)
    expected = [1, 1, 0.75, 0.5, 0, 0]
    np.testing.assert_allclose(Cads().keep(t), expected, atol=1e-6)


def noisy(embedding, keep, psi, scale=0.7, null=False):
    size = len(embedding)
    noise = LabelNoise(
        keys=jax.random.split(jax.random.key(2), size),
        keep=jnp.full(size, keep),
        noise_scale=scale,
        rescale=psi,
        uses=Uses(),
    )
    return np.asarray(noise(embedding, jnp.full(size, null)), np.float64)


def test_noise_has_the_mean_and_the_variance_of_the_equation():
    size, width, keep = 4000, 8, 0.3
    e = jnp.broadcast_to(jnp.linspace(-1, 2, width), (size, width))
    rest = noisy(e, keep, psi=0.0) - np.sqrt(keep) * np.asarray(e)
    deviation = 0.7 * np.sqrt(1 - keep)
    assert np.abs(rest.mean()) < 5 * deviation / np.sqrt(size * width)
    # The variance of n draws has the relative standard error (2 / n)^0.5.
    tolerance = 5 * np.sqrt(2 / (size * width))
    assert rest.var() == pytest.approx(deviation**2, rel=tolerance)


def test_rescaled_noise_has_the_moments_of_the_embedding():
    e = jax.random.normal(jax.random.key(3), (5, 16)) * 2 + 1
    whole, half, none = (noisy(e, 0.3, psi) for psi in (1.0, 0.5, 0.0))
    for moment in (np.mean, np.std):
        expected = moment(np.asarray(e, np.float64), axis=1)
        np.testing.assert_allclose(moment(whole, axis=1), expected, rtol=1e-5)
        assert np.abs(moment(none, axis=1) - expected).max() > 0.1
    np.testing.assert_allclose(half, (whole + none) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keep", "null"), [(1.0, False), (0.3, True)])
def test_a_kept_and_a_null_embedding_are_untouched(keep, null):
    e = jax.random.normal(jax.random.key(3), (5, 16))
    np.testing.assert_array_equal(noisy(e, keep, 1.0, null=null), e)


def test_late_steps_and_the_null_class_are_those_without_it():
    null = jnp.full(6, NULL)
    np.testing.assert_array_equal(x(Cads(), t=0.5), x(t=0.5))
    np.testing.assert_array_equal(x(Cads(), label=null), x(label=null))
    assert np.abs(x(Cads()) - x()).max(1).min() > 1e-3


def test_early_steps_see_nothing_of_the_class():
    blind = Cads(rescale=0.0)
    other = (LABEL + 1) % 4
    np.testing.assert_allclose(x(blind), x(blind, label=other), rtol=1e-6, atol=1e-6)
    assert np.abs(x() - x(label=other)).max() > 1e-3


def test_noise_is_a_function_of_the_key_and_the_time():
    same = jnp.zeros_like(LABEL)
    found = x(Cads(rescale=0.0), label=same)
    turned = x(Cads(rescale=0.0), label=same, keys=jnp.roll(KEYS, 1))
    alone = x(Cads(rescale=0.0), label=same[:1], keys=KEYS[:1])
    np.testing.assert_allclose(alone, found[:1], rtol=1e-5, atol=1e-6)
    assert np.abs(turned - found).max() > 1e-4
    # The same key twice is the same noise; at another time it is another one.
    e = jnp.zeros((6, 16))
    drawn = []

    def listen(z_t, t, cond):
        drawn.append(cond["label_noise"](e, cond["label"] == NULL))
        return Prediction(z_t, z_t)

    it = Cads(tau_1=0.1, tau_2=0.2, rescale=0.0)(listen, PROCESS, SPEC)
    cond = {"label": LABEL, "key": KEYS.at[1].set(KEYS[0])}
    for t in (0.9, 0.9, np.nextafter(np.float32(0.9), np.float32(1.0))):
        it(jnp.zeros((6, 3)), jnp.float32(t), cond)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0][0], drawn[0][1])
    assert np.abs(drawn[0] - drawn[2]).max(1).min() > 0.01
    assert np.abs(drawn[0][0] - drawn[0][2]).max() > 0.01
    # None of it is what samplers draw from the same key: z_1, or the noise of a step.
    for use in range(65):
        step = jax.random.normal(jax.random.fold_in(KEYS[0], use), (16,))
        assert np.abs(0.25 * step - drawn[0][0]).max() > 0.01


@pytest.mark.parametrize("two_pass", [False, True])
def test_classifier_free_guidance_corrupts_the_conditional_half_only(two_pass):
    options = dict(two_pass=True) if two_pass else dict(logsnr_max=50.0)
    free = ClassifierFree(guidance_scale=3.0, **options)
    conditional, null = x(Cads()), x(label=jnp.full(6, NULL))
    expected = null + 3.0 * (conditional - null)
    np.testing.assert_allclose(x(free, Cads()), expected, rtol=1e-5, atol=1e-5)


def test_no_noise_is_the_same_function():
    assert Cads(noise_scale=0.0)(deaf, PROCESS, SPEC) is deaf


def deaf(z_t, t, cond):
    return Prediction(z_t, z_t)


def test_a_network_that_ignores_the_noise_is_an_error():
    z_t, cond = jnp.zeros((6, 3)), {"label": LABEL, "key": KEYS}
    said = "config.guidance.cads: the network does not embed its label"
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(base.compose([Cads()], deaf, PROCESS, SPEC), z_t, 0.5, cond)
    # The reference of autoguidance must hear it, too.
    both = [Autoguidance(reference="r", guidance_scale=2.0), Cads()]
    guided = base.compose(both, predict(), PROCESS, SPEC, [deaf, None])
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(guided, z_t, 0.5, cond)
    heard = base.compose(both, predict(), PROCESS, SPEC, [predict(), None])
    np.testing.assert_allclose(
        jax.jit(heard)(z_t, 0.95, cond).x,
        run(Cads())(z_t, jnp.float32(0.95), cond).x,
        rtol=1e-5,
        atol=1e-5,
    )


def test_without_keys_or_classes_it_is_refused():
    with pytest.raises(ValueError, match="noise_scale: 0.25 needs labels"):
        Cads()(predict(), PROCESS, SPEC._replace(num_classes=0))
    with pytest.raises(ValueError, match="needs the keys of the samples"):
        Cads()(predict(), PROCESS, SPEC)(jnp.zeros((6, 3)), 0.5, {"label": LABEL})


@pytest.mark.parametrize(
    "wrong",
    [
        dict(noise_scale=-1.0),
        dict(tau_1=0.9, tau_2=0.6),
        dict(tau_1=-0.1),
        dict(rescale=1.5),
    ],
)
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: must be"):
        Cads(**wrong)
