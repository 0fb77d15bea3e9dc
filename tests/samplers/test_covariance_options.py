"""The options of covariance-aware sampling: derivatives, counts, known variances."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known import mixture, ones

from diffusionlab import registry
from diffusionlab.models import network
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, bases, covariance
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Prediction

# As good as without truncation: alpha is 2e-9 at t = 1.
PROCESS = Gaussian(schedule=Cosine(logsnr_min=-40.0, logsnr_max=40.0), prediction="v")
EXACT = functools.partial(covariance.Covariance, logsnr_reliable=-1e9)
KEYS = jax.random.split(jax.random.key(0), 4)


def build(**options):
    block = {"name": "covariance", "num_steps": 2, **options}
    return registry.build("sampler", block, "config.sampler")


def test_finite_differences_agree_with_the_derivative():
    t = jnp.float32(0.6)
    predict = mixture(PROCESS, std=0.5)
    z_t, v = (jax.random.normal(key, (64, 4)) for key in KEYS[:2])

    @jax.jit
    def products(z_t, v):
        tangents = [
            rule.at(lambda z: predict(z, t), z_t, 1e-2)
            for rule in covariance.DERIVATIVES.values()
        ]
        single = [tangent.product(v)[1] for tangent in tangents]
        return single, [tangent.linearise()[1](10.0 * v) for tangent in tangents]

    single, several = products(z_t, v)
    exact, central, one_sided = single
    size = jnp.abs(exact).max()
    assert jnp.abs(central - exact).max() < 1e-3 * size
    assert 1e-3 * size < jnp.abs(one_sided - exact).max() < 0.05 * size
    # The step is in units of the probe: ten times the probe is ten times the product.
    for one, ten in zip(single, several, strict=True):
        np.testing.assert_allclose(10.0 * one, ten, atol=1e-2 * float(size))


@pytest.mark.parametrize("difference", [0.1, 0.2])
def test_the_size_of_the_difference_is_that_of_the_field(difference):
    """For x_hat = z³ the central difference at 0 is its square."""
    sampler = EXACT(
        num_steps=1,
        basis=bases.PixelIsotropic(),
        derivative="central",
        difference=difference,
    )
    t = PROCESS.schedule.inverse(jnp.float32(0.0))
    state = sampler.init(jnp.zeros((4, 1)), t)
    predict = lambda z, t: Prediction(z**3, z)  # noqa: E731
    with mock.patch.object(base, "normal", ones):
        x = sampler.step(PROCESS, predict, state, t, jnp.float32(0), KEYS).x
    # sigma² / alpha is sqrt(1/2) here.
    np.testing.assert_allclose(x, 0.5**0.25 * difference, rtol=1e-4)


def test_a_network_in_bfloat16_needs_a_larger_difference():
    numbers = np.random.default_rng(0)
    first, last = (np.float32(numbers.normal(size=(64, 64)) / 8) for _ in range(2))
    t = jnp.float32(0.5)

    def denoise(z, dtype):
        hidden = jnp.tanh(z.astype(dtype) @ first.astype(dtype))
        return PROCESS.predict(hidden @ last.astype(dtype), z, t)

    @jax.jit
    def products(z_t, v):
        def product(name, size, dtype=jnp.bfloat16):
            rule = covariance.DERIVATIVES[name]
            return rule.at(lambda z: denoise(z, dtype), z_t, size).product(v)[1]

        exact = product("jvp", 0.0, jnp.float32)
        return exact, product("central", 0.2), product("central", 1e-2)

    z_t, v = jax.random.normal(KEYS[0], (4, 64)), bases.signs(KEYS, (64,))
    exact, large, small = products(z_t, v)
    large, small = (
        np.linalg.norm(found - exact) / np.linalg.norm(exact)
        for found in (large, small)
    )
    assert large < 0.04 and small > 0.08


def counted():
    """A prediction that counts its evaluations, its products, and how often traced."""
    count = {"plain": 0, "product": 0, "traced": 0}

    def tick(name):
        count[name] += 1

    @jax.custom_jvp
    def square(z):
        jax.debug.callback(lambda: tick("plain"))
        return jnp.tanh(z)

    @square.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda: tick("product"))
        return jax.jvp(jnp.tanh, primals, tangents)

    def predict(z_t, t):
        count["traced"] += 1
        return Prediction(square(z_t), z_t)

    return predict, count


@pytest.mark.parametrize(
    ("options", "evaluations", "free", "plain", "products"),
    [
        ({}, 10, 5, 0, 5),
        (dict(eta=0.0), 5, 5, 5, 0),
        (dict(eta_last=0.0), 9, 5, 1, 4),
        (dict(derivative="one_sided"), 10, 10, 10, 0),
        (dict(derivative="central"), 15, 15, 15, 0),
        (dict(derivative="central", eta_last=0.0), 13, 13, 13, 0),
    ],
)
def test_evaluations_are_counted(options, evaluations, free, plain, products):
    sampler = build(num_steps=5, basis=dict(name="dct_global"), **options)
    assert sampler.num_evaluations == evaluations
    assert sampler.num_predictions == free
    predict, count = counted()
    sample = jax.jit(lambda keys: base.sample(sampler, PROCESS, predict, keys, (4,)))
    sample(KEYS).block_until_ready()
    jax.effects_barrier()
    assert (count["plain"], count["product"]) == (plain, products)
    traced = count["traced"]
    sample(KEYS[::-1]).block_until_ready()
    assert count["traced"] == traced
    if not options:
        assert traced == 1


def test_evaluations_of_several_products_are_counted():
    lanczos = dict(name="lanczos", num_products=3)
    assert build(num_steps=5, basis=lanczos).num_evaluations == 20
    assert build(num_steps=5, basis=lanczos).num_predictions == 5
    central = build(num_steps=5, basis=lanczos, derivative="central")
    assert central.num_evaluations == central.num_predictions == 35


def variance_of(sampler, slope, t):
    """Eigenvalue of Sigma that the sampler takes for J = slope."""
    return np.ravel(sampler._variances(PROCESS, jnp.float32(slope), t))[0]


def test_known_variances_bound_the_estimate():
    sampler = build(basis=dict(name="pixel_isotropic"), data_variances=(0.5,))
    t = PROCESS.schedule.inverse(jnp.float32(0.0))
    # sigma² / alpha is sqrt(1/2) here.
    assert variance_of(sampler, 1.0, t) == pytest.approx(0.5**0.5, rel=1e-5)
    assert variance_of(sampler, 100.0, t) == 2.0
    assert variance_of(sampler, -1.0, t) == 0.0
    assert variance_of(build(), 100.0, t) == pytest.approx(5000**0.5, rel=1e-5)
    assert variance_of(build(), -1.0, t) == 0.0


def test_the_estimate_is_not_used_where_it_is_not_reliable():
    isotropic = dict(name="pixel_isotropic")
    noisy = PROCESS.schedule.inverse(jnp.float32(-8.5))
    known = dict(basis=isotropic, data_variances=(0.5,))
    assert variance_of(build(**known), 1.0, noisy) == 0.5
    assert variance_of(build(logsnr_reliable=-9.0, **known), 1.0, noisy) == 2.0
    assert variance_of(build(), 1.0, noisy) == 0.0
    # sigma² / alpha there is exp(4.25) but for a part of exp(-8.5).
    found = variance_of(build(logsnr_reliable=-9.0), 1.0, noisy)
    assert found == pytest.approx(math.exp(4.25), rel=1e-3)


def test_a_random_guided_network_is_sampled_without_a_nan():
    spec = DataSpec((8, 8, 3), 4)
    block = dict(name="dit", patch_size=4, width=16, num_layers=1, num_heads=2)
    module = registry.build(
        "network", block, "config.networks.x", spec=spec, dtype="float32"
    )
    net = network.as_network(module, spec)
    process = Gaussian(
        schedule=Cosine(logsnr_min=-12.0, logsnr_max=12.0), prediction="v"
    )
    guide = registry.build(
        "guidance", dict(name="classifier_free", guidance_scale=3.0), "config.guidance"
    )

    def conditional(params, z_t, t, cond):
        size = z_t.shape[0]
        full = jnp.full(size, t)
        cond = {**cond, "t": full, "logsnr": process.schedule.logsnr(full)}
        return process.predict(net.apply(params, z_t, cond), z_t, full)

    numbers = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.float32(0.3 * numbers.normal(size=p.shape)),
        jax.eval_shape(net.init, KEYS[0]),
    )

    @jax.jit
    def sample(params, keys):
        guided = guide(functools.partial(conditional, params), process, spec)
        cond = {"label": jnp.arange(2, dtype=jnp.int32)}
        return base.sample(
            build(num_steps=4, grid=dict(name="logsnr", logsnr_max=11.9)),
            process,
            lambda z_t, t: guided(z_t, t, cond),
            keys,
            spec.shape,
        )

    x = sample(params, KEYS[:2])
    assert np.isfinite(x).all() and np.abs(x).max() > 0.1


def check(shape, **options):
    build(**options).check(PROCESS, DataSpec(shape))


def test_a_basis_that_does_not_suit_the_data_is_refused():
    check((8, 8, 3))
    check((2,), basis=dict(name="dct_global"))
    check((2,), basis=dict(name="oracle", num_products=2))
    with pytest.raises(ValueError, match="basis: .*images.*pixel_isotropic, lanczos"):
        check((2,))
    with pytest.raises(ValueError, match=r"basis\.num_products: must be the 2 entries"):
        check((2,), basis=dict(name="oracle", num_products=3))


def test_variances_that_do_not_suit_the_basis_are_refused():
    isotropic = dict(name="pixel_isotropic")
    check((8, 8, 1), data_variances=(1.0,))
    check((2, 2, 1), data_variances=[[[1.0], [2.0]], [[3.0], [4.0]]])
    with pytest.raises(ValueError, match=r"data_variances: .*\[8, 8, 1\], got \[3\]"):
        check((8, 8, 1), basis=isotropic, data_variances=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="data_variances: .*pixel_isotropic"):
        check((8, 8, 1), basis=dict(name="lanczos"), data_variances=(1.0,))


@pytest.mark.parametrize(
    "options",
    [dict(eta=1.5), dict(eta_last=-0.1), dict(derivative="backward"),
     dict(num_steps=0), dict(difference=0.0)],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"config.sampler.{name}: "):
        build(**options)
