"""Guided distillation: the target, the weights, the scale, the second stage."""

import types as simple

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffusionlab import checks
from diffusionlab.distillation import base
from diffusionlab.distillation import guided as lib
from diffusionlab.models import layers
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.times import Uniform
from diffusionlab.types import DataSpec, Network, Prediction, Teacher, lift

SPEC = DataSpec((1,), 2)
PROCESS = Gaussian(schedule=Cosine(), prediction="x")
MEANS, STD = jnp.array([-1.0, 1.5]), 0.3


def exact(z_t, t, label):
    """E[x | z_t, label] of N(MEANS[label], STD²), label 2 being both at even odds."""
    alpha, sigma = (lift(q, 2) for q in PROCESS.schedule.alpha_sigma(t))
    v = alpha**2 * STD**2 + sigma**2
    offset = z_t - alpha * MEANS
    each = MEANS + alpha * STD**2 / v * offset
    shares = jax.nn.softmax(-(offset**2) / (2 * v))
    known = jax.nn.one_hot(label, 2)
    shares = jnp.where((label == 2)[:, None], shares, known)
    return jnp.sum(shares * each, axis=1, keepdims=True)


def as_prediction(x, z_t, t):
    return PROCESS.predict(x, z_t, t)


def teach(params, z_t, t, cond):
    return as_prediction(exact(z_t, t, cond["label"]), z_t, t)


def student(factor=1.0):
    """The guided denoiser in one call, times `a`."""

    def apply(params, z, cond, *, train=False, key=None):
        w, t = cond["guidance_scale"][:, None], cond["t"]
        told, untold = exact(z, t, cond["label"]), exact(z, t, 0 * cond["label"] + 2)
        return params["a"] * (w * told + (1 - w) * untold)

    return Network(lambda key: {"a": jnp.float32(factor)}, apply, ())


def make(**fields):
    own = dict(process=PROCESS, spec=SPEC, times=Uniform())
    own |= dict(networks={"denoiser": student()}, teacher=Teacher(teach, True))
    return lib.Guided(**{**own, **fields})


def batch(size=16):
    label = jnp.arange(size) % 2
    return {"x": MEANS[label][:, None] + 0.1, "label": label}


def test_the_target_is_linear_in_the_scale_and_the_teacher_at_one():
    objective, z, t = make(), jnp.linspace(-2, 2, 8)[:, None], jnp.linspace(0.1, 0.9, 8)
    cond = {"label": jnp.arange(8) % 2}
    target = jax.jit(lambda w: objective.target({}, z, t, cond, jnp.full(8, w)).x)
    told, untold = exact(z, t, cond["label"]), exact(z, t, jnp.full(8, 2))
    assert jnp.max(abs(told - untold)) > 0.5
    np.testing.assert_allclose(target(1.0), told, atol=1e-5)
    np.testing.assert_allclose(target(0.0), untold, atol=1e-5)
    # The paper's w is ours minus 1.
    for w in (0.5, 4.0):
        np.testing.assert_allclose(
            target(1.0 + w), (1 + w) * told - w * untold, atol=1e-4
        )


def test_a_student_that_is_linear_in_the_scale_is_exact_at_unseen_ones():
    objective = make(min_guidance_scale=1.0, max_guidance_scale=3.0)
    inputs = toys.inputs(jnp.zeros(1))._replace(batch=batch())
    grad = jax.jit(jax.value_and_grad(lambda a: objective.loss(
        {"student": {"a": a}}, inputs)[0]))  # fmt: skip
    value, slope = grad(jnp.float32(1.0))
    # The errors of eps at the clean end are roundings of x over sigma = 5e-4.
    assert value < 1e-6 and abs(slope) < 1e-2
    assert grad(jnp.float32(0.9))[0] > 0.01
    z, t = jnp.array([[0.2], [1.0]]), jnp.array([0.5, 0.3])
    cond = {"label": jnp.array([0, 1]), "guidance_scale": jnp.array([9.0, 7.5])}
    found = objective.predict({"student": {"a": jnp.float32(1)}}, z, t, cond)
    w = cond.pop("guidance_scale")
    said = objective.target({}, z, t, cond, w)
    np.testing.assert_allclose(found.x, said.x, rtol=1e-5)


@pytest.mark.parametrize("truncated", [False, True])
def test_the_weight_on_x_is_the_signal_to_noise_ratio(truncated, monkeypatch):
    t = jnp.array([0.2, 0.4, 0.6, 0.8])
    monkeypatch.setattr(Uniform, "sample", lambda *_: (t, jnp.ones(4)))
    objective = make(truncated_snr=truncated)
    inputs = toys.inputs(jnp.zeros(1))._replace(batch=batch(4))
    _, metrics = objective.loss({"student": {"a": jnp.float32(0.8)}}, inputs)
    keys = base.split(inputs.key, 4)
    z_t, _ = PROCESS.corrupt(keys[1], batch(4)["x"], t)
    w = jax.random.uniform(keys[2], (4,), minval=1.0, maxval=5.0)
    label = {"label": batch(4)["label"]}
    square = 0.04 * objective.target({}, z_t, t, label, w).x[:, 0] ** 2
    snr = jnp.exp(PROCESS.schedule.logsnr(t))
    omega = jnp.maximum(snr, 1) if truncated else snr + 1
    np.testing.assert_allclose(metrics["loss"][0], (omega * square).sum(), rtol=1e-3)
    np.testing.assert_allclose(metrics["mse"][0], square.sum(), rtol=1e-3)


def test_sampling_takes_the_scale_of_the_config():
    objective = make(sample_guidance_scale=3.0)
    params = {"student": {"a": jnp.float32(1)}}
    z, t, cond = jnp.ones((2, 1)), jnp.full(2, 0.5), {"label": jnp.array([0, 1])}
    said = objective.target({}, z, t, cond, jnp.full(2, 3.0)).x
    np.testing.assert_allclose(objective.predict(params, z, t, cond).x, said, rtol=1e-5)


def test_a_second_stage_is_told_the_scale_of_the_first():
    first = make(sample_guidance_scale=3.0)
    experiment = simple.SimpleNamespace(objective=first, spec=SPEC)
    teacher = checks.as_teacher(experiment)
    assert teacher.cond == {"guidance_scale": 3.0} and not teacher.has_null_label
    second = simple.SimpleNamespace(
        process=PROCESS, networks={"denoiser": student()}, teacher=teacher,
        spec=SPEC, guidance_scale=1.0,
    )  # fmt: skip
    params = {"a": jnp.float32(1)}
    z, t, cond = jnp.ones((2, 1)), jnp.full(2, 0.5), {"label": jnp.array([0, 1])}
    same = base.teach(second, {"student": params}, z, t, cond)
    found = base.apply(second, params, z, t, cond)
    np.testing.assert_array_equal(found.x, same.x)
    other = base.apply(second, params, z, t, {**cond, "guidance_scale": jnp.ones(2)})
    assert jnp.max(abs(other.x - same.x)) > 0.1
    # And so is a third.
    experiment = simple.SimpleNamespace(objective=second, spec=SPEC)
    second.predict = None
    assert checks.as_teacher(experiment).cond == {"guidance_scale": 3.0}


def test_the_features_of_a_scale_follow_a_line_and_tell_neighbours_apart():
    """Fourier features made for logsnr serve weights from 0 to 14, too."""
    w = jnp.linspace(0, 14, 29)
    features = np.asarray(layers.fourier_features(w, 128), np.float64)
    between = np.asarray(layers.fourier_features(w[:-1] + 0.25, 128), np.float64)
    fitted = np.linalg.lstsq(features, np.asarray(w, np.float64), rcond=1e-6)[0]
    np.testing.assert_allclose(between @ fitted, w[:-1] + 0.25, atol=0.01)
    apart = np.linalg.norm(features[:, None] - features, axis=-1)
    nearest = np.min(apart + 1e9 * np.eye(29), axis=1)
    assert np.all(nearest > 0.1 * np.sqrt(64))


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(teacher=None), "config.teacher: missing"),
        (dict(teacher=Teacher(teach, False)), "trained with labels and without"),
        (dict(sample_guidance_scale=6.0), "must be between min_guidance_scale and"),
        (dict(networks={"denoiser": toys.linear()}), r"use \('guidance_scale',\)"),
    ],
)
def test_what_cannot_be_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        make(**fields)


def test_the_cost_of_a_step():
    net = costs.wide()

    def apply(params, z, cond, *, train=False, key=None):
        return net.apply(
            params, z + (cond["guidance_scale"][:, None] if cond else 0), cond
        )

    params = net.init(jax.random.key(0))

    def predict(p, z, t, cond):
        return Prediction(*(net.apply(p, z, cond),) * 2)

    objective = make(
        networks={"denoiser": Network(net.init, apply, ())},
        teacher=Teacher(predict, True),
    )
    inputs = toys.inputs(
        jnp.zeros(1), params={"student": params, "teacher": params}
    )._replace(batch=batch(8))
    found = costs.network_evaluations(objective, "train", inputs)
    assert objective.evaluations == {"train": 5}
    np.testing.assert_allclose(found, 5, rtol=0.1)
