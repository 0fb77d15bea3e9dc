"""sCM: the exact function, the tangent, the loss, the cost."""

import dataclasses

import costs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from diffusionlab.distillation import continuous_consistency as lib
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.linear_beta import LinearBeta
from diffusionlab.schedules.times import LogNormal
from diffusionlab.types import DataSpec, Network, Prediction, Teacher, lift

D = 0.5
PROCESS = Gaussian(schedule=Cosine(), prediction="x", sigma_data=D)
TIMES = LogNormal(mean=-1.0, std=1.4)


def network(function):
    """A network without parameters but a factor: x_hat = a function(z, logsnr)."""

    def apply(params, z, cond, *, train=False, key=None):
        return params["a"] * function(z, cond["logsnr"][:, None])

    return Network(lambda key: {"a": jnp.float32(1)}, apply, ())


def exact(z_t, logsnr):
    """f* = x_tau of N(0, D² I) data under alpha² + sigma² = 1."""
    alpha2 = jax.nn.sigmoid(logsnr)
    return D * z_t / jnp.sqrt(alpha2 * D**2 + 1 - alpha2)


def curved(z_t, logsnr):
    return jnp.sin(z_t) + 0.2 * jnp.cos(0.3 * logsnr) * z_t


def denoised(params, z, t, cond):
    alpha, sigma = (lift(q, z.ndim) for q in PROCESS.schedule.alpha_sigma(t))
    v = alpha**2 * D**2 + sigma**2
    return Prediction(alpha * D**2 / v * z, sigma / v * z)


def uncertainty(value=0.0):
    def apply(params, z, cond, train):
        return jnp.full(z.shape[:1], params["u"])

    return Network(lambda key: {"u": jnp.float32(value)}, apply, ())


def make(function=curved, **fields):
    own = dict(process=PROCESS, spec=toys.SPEC, times=TIMES, warmup_steps=0)
    fields = {**own, "teacher": Teacher(denoised, False), **fields}
    fields.setdefault(
        "networks", {"denoiser": network(function), "uncertainty": uncertainty()}
    )
    return lib.ContinuousConsistency(**fields)


def time_of(tau):
    return PROCESS.schedule.inverse(-2 * jnp.log(D * jnp.tan(tau)))


def test_the_exact_network_of_gaussian_data_is_a_fixed_point():
    t = time_of(jnp.array([1.0, 0.1, 0.6, 1.5]))
    z_t = jnp.array([[0.7], [-1.0], [0.3], [2.0]])
    objective = make(exact)
    path = denoised(None, z_t, t, {})
    raw, g = jax.jit(
        lambda z_t, t: objective._raw_and_tangent(
            {"a": 1.0}, path, z_t, t, {}, None, jnp.int32(0)
        )
    )(z_t, t)
    cos, sin, scale = (lift(q, 2) for q in lib.trig_scales(PROCESS, t))
    x_tau = scale * z_t
    np.testing.assert_allclose(raw[0] * D / x_tau[0], -0.546302, rtol=1e-4)
    np.testing.assert_allclose(raw, -(sin / (1 + cos)) * x_tau / D, rtol=1e-4)
    # The velocity of the flow is zero: x_tau stays where it is.
    np.testing.assert_allclose(lib.trig_network(PROCESS, path, t), 0, atol=1e-5)
    np.testing.assert_allclose(g, 0, atol=1e-5)


def test_for_data_of_unit_variance_the_variables_are_the_process_itself():
    process = Gaussian(schedule=Cosine(), prediction="v")
    t = jnp.linspace(0, 1, 9)
    alpha, sigma = process.schedule.alpha_sigma(t)
    cos, sin, scale = lib.trig_scales(process, t)
    np.testing.assert_allclose([cos, sin], [alpha, sigma], rtol=1e-5)
    np.testing.assert_allclose(scale, 1, rtol=1e-5)
    v, z_t = jnp.linspace(-1, 1, 9)[:, None], jnp.ones((9, 1))
    prediction = process.predict(v, z_t, t)
    np.testing.assert_allclose(lib.trig_network(process, prediction, t), v, atol=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), LinearBeta()])
def test_the_tangent_is_that_of_the_variables_of_the_paper(schedule):
    """Against (1) and (2) written out in tau, and differentiated there."""
    process = Gaussian(schedule=schedule, prediction="x", sigma_data=D)
    objective = make(process=process)
    x, eps, tau = jnp.array([[0.4]]), jnp.array([[-0.8]]), jnp.array([0.8])
    logsnr = -2 * jnp.log(D * jnp.tan(tau))
    t = schedule.inverse(logsnr)

    def paper(tau, warmup):
        cos, sin = jnp.cos(tau), jnp.sin(tau)

        def f(x_tau, tau):
            logsnr = -2 * jnp.log(D * jnp.tan(tau))
            alpha = jnp.sqrt(jax.nn.sigmoid(logsnr))
            return curved(alpha / jnp.cos(tau) * x_tau, logsnr)

        def big(x_tau, tau):
            return (jnp.cos(tau) * x_tau - f(x_tau, tau)) / (jnp.sin(tau) * D)

        x_tau = cos * x + sin * D * eps
        along = cos * D * eps - sin * x
        raw, derivative = jax.jvp(big, (x_tau, tau), (along, jnp.ones_like(tau)))
        _, total = jax.jvp(f, (x_tau, tau), (along, jnp.ones_like(tau)))
        g = -(cos**2) * (D * raw - along) - warmup * cos * sin * (
            x_tau + D * derivative
        )
        return raw, g, cos * total

    for step, warmup in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        slow = dataclasses.replace(objective, warmup_steps=10)
        raw, g = slow._raw_and_tangent(
            {"a": 1.0},
            Prediction(x, eps),
            process.mix(x, eps, t),
            t,
            {},
            None,
            jnp.int32(step),
        )
        said_raw, said_g, total = paper(tau, warmup)
        np.testing.assert_allclose(raw, said_raw, rtol=1e-3)
        np.testing.assert_allclose(g, said_g, rtol=2e-3)
    # The prior weight 1 / (D tan tau) is in g: sin(tau) D times it is cos(tau).
    np.testing.assert_allclose(g, total, rtol=2e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_is_the_small_tangent(normalize, monkeypatch):
    objective = make(mode="training", normalize=normalize, learned_weighting=False)
    t = time_of(jnp.array([0.2, 0.7, 1.2, 1.4]))

    def sample(self, key, size, schedule):
        return (t, jnp.array([1.0, 2.0, 0.5, 1.0]))

    monkeypatch.setattr(LogNormal, "sample", sample)
    x = jnp.array([[0.5], [-0.3], [0.1], [0.9]])
    inputs = toys.inputs(x)

    def loss(a):
        return objective.loss({"student": {"a": a}}, inputs)[0]

    found = jax.grad(loss)(jnp.float32(1.3))
    keys = lib.base.split(inputs.key, 3)
    z_t, eps = PROCESS.corrupt(keys[1], x, t)

    def raw_and_g(a):
        return objective._raw_and_tangent(
            {"a": a}, Prediction(x, eps), z_t, t, {}, None, jnp.int32(0)
        )

    (_, g), (slope, no_slope) = jax.jvp(raw_and_g, (jnp.float32(1.3),), (1.0,))
    assert not np.any(no_slope)
    small = g / (abs(g) + 0.1) if normalize else np.clip(g, -1, 1)
    said = -2 * np.mean(np.array([1.0, 2.0, 0.5, 1.0])[:, None] * small * slope)
    np.testing.assert_allclose(found, said, rtol=1e-4)
    if not normalize:
        assert np.any(abs(g) > 1) and np.any(abs(g) < 1)


def test_the_mask_of_dropout_is_the_same_for_value_and_tangent():
    def apply(params, z, cond, *, train=False, key=None):
        assert train
        return jax.random.bernoulli(key, 0.5, z.shape) * jnp.sin(z)

    objective = make(networks={"denoiser": Network(None, apply, ())},
                     learned_weighting=False)  # fmt: skip
    plain = make(lambda z, logsnr: jnp.sin(z))
    zero = make(lambda z, logsnr: 0 * z)
    t, z_t = time_of(jnp.full(8, 0.7)), jnp.linspace(-1, 1, 8)[:, None]
    path = denoised(None, z_t, t, {})
    key, step = jax.random.key(3), jnp.int32(0)
    dropped = objective._raw_and_tangent({}, path, z_t, t, {}, key, step)
    mask = jax.random.bernoulli(key, 0.5, z_t.shape)
    assert 0 < mask.sum() < 8
    parts = [o._raw_and_tangent({"a": 1.0}, path, z_t, t, {}, None, step)
             for o in (plain, zero)]  # fmt: skip
    for found, kept, lost in zip(dropped, *parts, strict=True):
        np.testing.assert_allclose(found, jnp.where(mask, kept, lost), rtol=1e-5)


def test_the_learned_weight_and_the_metrics():
    objective = make(networks={"denoiser": network(curved),
                               "uncertainty": uncertainty()})  # fmt: skip
    inputs = toys.inputs(jnp.linspace(-1, 1, 8)[:, None])

    @jax.jit
    def run(u):
        params = {"student": {"a": jnp.float32(1)}, "uncertainty": {"u": u}}
        return jax.value_and_grad(objective.loss, has_aux=True)(params, inputs)

    (loss, metrics), grads = run(jnp.float32(0.7))
    error = metrics["weighted_error"][0] / 8
    np.testing.assert_allclose(loss, error * np.exp(-0.7) + 0.7, rtol=1e-5)
    np.testing.assert_allclose(
        grads["uncertainty"]["u"], 1 - error * np.exp(-0.7), rtol=1e-4
    )
    assert metrics["tangent"][0] > 0


def test_the_guided_path_extrapolates_the_network():
    def predict(params, z, t, cond):
        known = (cond["label"] < 3)[:, None]
        x = jnp.where(known, 1.0, 0.25) * z
        alpha, sigma = (lift(q, z.ndim) for q in PROCESS.schedule.alpha_sigma(t))
        return Prediction(x, (z - alpha * x) / sigma)

    objective = make(
        teacher=Teacher(predict, True), guidance_scale=3.0, spec=DataSpec((1,), 3)
    )
    t, z = time_of(jnp.array([0.5])), jnp.ones((1, 1))
    label = {"label": jnp.zeros(1, jnp.int32)}
    null = {"label": jnp.full(1, 3)}

    def big(p):
        return lib.trig_network(PROCESS, p, t)

    told, untold = (big(predict({}, z, t, c)) for c in (label, null))
    guided = big(lib.base.teach(objective, {}, z, t, label))
    np.testing.assert_allclose(guided, told + 2.0 * (told - untold), rtol=1e-5)


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(mode="both"), "mode: expected distillation or training"),
        (dict(mode="training", guidance_scale=2.0), "guidance_scale: 2.0 is the"),
        (dict(guidance_scale=2.0), "needs a teacher that was trained with labels"),
        (dict(tangent_constant=-1.0), "tangent_constant: must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        make(**fields)


def test_the_sampler_is_that_of_consistency_models():
    make().check_sampler(Consistency(num_steps=2))
    with pytest.raises(ValueError, match="name: Ddim with 2 steps"):
        make().check_sampler(Ddim(num_steps=2))


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_the_cost_of_a_step(mode):
    net = costs.wide()
    params = net.init(jax.random.key(0))
    process = Gaussian(schedule=Cosine(), prediction="v")

    def predict(params, z, t, cond):
        return process.predict(net.apply(params, z, cond), z, t)

    objective = lib.ContinuousConsistency(
        process=process, spec=DataSpec((costs.SIZE,)), networks={"denoiser": net},
        times=TIMES, teacher=Teacher(predict, False), learned_weighting=False,
        mode=mode,
    )  # fmt: skip
    x = jnp.ones((8, costs.SIZE))
    inputs = toys.inputs(x, params={"student": params, "teacher": params})
    found = costs.network_evaluations(objective, "train", inputs)
    said = {"distillation": 5, "training": 4}[mode]
    assert objective.evaluations == {"train": said}
    np.testing.assert_allclose(found, said, rtol=0.1)
