"""Bases on Jacobians that are known: what is exact, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry
from diffusionlab.samplers import base, bases, frames
from diffusionlab.types import Prediction

BLOCKS = {
    "dct_global": {},
    "dct_block": dict(block=4),
    "dct_conv": dict(block=3, window=5),
    "fft_global": {},
    "pixel_isotropic": {},
    "lanczos": dict(num_products=4),
    "oracle": dict(num_products=64),
}
FRAMES = [name for name in BLOCKS if name not in ("lanczos", "oracle")]
SHAPE = (8, 4, 2)
KEYS = jax.random.split(jax.random.key(0), 4)


def build(name, **options):
    block = {"name": name, **BLOCKS[name], **options}
    return registry.build("basis", block, "config.sampler.basis")


def linear(jacobian):
    """The tangent of x_hat = J z at zero, for a function v -> J v."""

    def product(v):
        return Prediction(jnp.zeros_like(v), jnp.ones_like(v)), jacobian(v)

    def linearise():
        shape = jnp.zeros((len(KEYS), *SHAPE))
        return Prediction(shape, shape), jacobian

    return bases.Tangent(product, linearise)


def draw(basis, jacobian, keys=KEYS, shape=SHAPE):
    return basis.draw(linear(jacobian), keys, shape, lambda q: jnp.maximum(q, 0.0))[1]


def arrays(seed, size, count=4):
    return jax.random.normal(jax.random.key(seed), (count, *size))


def test_every_registered_basis_is_tested():
    assert set(BLOCKS) == set(registry.table("basis"))


@functools.cache
def facts(name, shape):
    """What the frame makes of random data, of every unit, and of J = 0.7 I."""
    frame = build(name).frame(shape)

    @jax.jit
    def compute(x, y, signs):
        forward, v = frame.forward(x), frame.inverse(signs)
        units = jnp.eye(np.prod(shape)).reshape(-1, *shape)
        power = jnp.sum(frame.forward(units) ** 2, 0)
        q = frames.eigenvalues(frame, v, 0.7 * v)
        seen = jnp.broadcast_to(frame.smooth(frame.forward(v) ** 2) > 1e-6, q.shape)
        turned = frame.inverse(jnp.concatenate([forward, y]))
        return x, y, forward, turned, power, q, seen

    x, y = arrays(1, shape), arrays(2, frame.size)
    signs = bases.signs(KEYS, frame.size)
    return tuple(np.asarray(q) for q in compute(x, y, signs))


SHAPES = [(name, SHAPE) for name in FRAMES] + [
    ("dct_global", (8,)),
    ("dct_conv", (4, 4, 3)),
    ("fft_global", (4, 2, 2, 1)),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_frame_is_inverted_by_its_transpose(name, shape):
    x, y, forward, turned, *_ = facts(name, shape)
    assert forward.shape == y.shape
    np.testing.assert_allclose(turned[:4], x, atol=1e-5)
    np.testing.assert_allclose(np.vdot(forward, y), np.vdot(x, turned[4:]), rtol=1e-3)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_the_power_of_a_frame_is_the_diagonal_of_its_gram_matrix(name, shape):
    power = facts(name, shape)[4]
    given = np.broadcast_to(build(name).frame(shape).power, power.shape)
    np.testing.assert_allclose(power, given, atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_multiple_of_the_identity_is_estimated_exactly(name, shape):
    q, seen = facts(name, shape)[5:]
    np.testing.assert_allclose(q[seen], 0.7, rtol=1e-5)
    assert seen.mean() > 0.8


@pytest.mark.parametrize("name", ["dct_global", "dct_block", "fft_global"])
def test_one_probe_is_exact_where_the_jacobian_is_diagonal(name):
    size = (16, 16, 1)
    frame = build(name).frame(size)
    k1, k2 = np.mgrid[:16, :16]
    spectrum = (1.0 / (1.0 + k1**2 + k2**2))[..., None]

    @jax.jit
    def estimate(signs):
        v = frame.inverse(signs)
        product, pixels = (
            frame.inverse(spectrum * frame.forward(q)) for q in (v, signs)
        )
        unnormalised = frame.forward(signs) * frame.forward(pixels)
        return frames.eigenvalues(frame, v, product), unnormalised

    exact, rough = estimate(bases.signs(KEYS, size))
    assert np.abs(exact - spectrum).max() < 1e-6
    # Signs of pixels are no signs in the frame.
    assert np.abs(rough / spectrum - 1).max() > 1


@pytest.mark.parametrize("name", FRAMES)
def test_noise_is_white_where_the_jacobian_is_the_identity(name):
    keys = jax.random.split(jax.random.key(1), 4096)
    noise = jax.jit(lambda keys: draw(build(name), lambda v: 0.25 * v, keys))
    x = np.asarray(noise(keys)).reshape(4096, -1)
    # An entry of the covariance has a standard error of 0.25 / 64 (times sqrt 2 on the
    # diagonal); the largest of 2,080 lies within 5 of them.
    np.testing.assert_allclose(x.T @ x / 4096, 0.25 * np.eye(64), atol=0.0276)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_draw_depends_on_its_own_key(name):
    weights = jnp.linspace(0.2, 1.0, 64).reshape(SHAPE)
    basis = build(name)
    noise = jax.jit(lambda keys: draw(basis, lambda v: weights * v, keys))
    others = jax.random.split(jax.random.key(9), 4).at[2].set(KEYS[2])
    x, y = noise(KEYS), noise(others)
    np.testing.assert_array_equal(x[2], y[2])
    assert len(np.unique(x)) == x.size and np.abs(x[0] - y[0]).max() > 0.1


def test_rings_share_a_rounded_radius_and_the_mean_stays_apart():
    basis = build("dct_global", smooth=True)
    frame = basis.frame((8, 8, 2))
    q = arrays(4, frame.size)
    smooth = np.asarray(jax.jit(frame.smooth)(q))
    radius = np.round(np.hypot(*np.mgrid[:8, :8])).astype(int)
    for r in range(11):
        expected = np.asarray(q)[:, radius == r].mean(1, keepdims=True)
        found = smooth[:, radius == r]
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), 1e-5)
    np.testing.assert_array_equal(smooth[:, 0, 0], q[:, 0, 0])


def test_rings_of_a_block_stay_in_it():
    frame = build("dct_block", smooth=True).frame((8, 8, 1))
    q = arrays(5, frame.size)
    smooth = np.asarray(jax.jit(frame.smooth)(q))
    radius = np.round(np.hypot(*np.mgrid[:4, :4])).astype(int)
    for i, j in np.ndindex(2, 2):
        place = np.s_[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 0]
        own, found = np.asarray(q)[place], smooth[place]
        np.testing.assert_allclose(
            found[:, radius == 2],
            np.repeat(own[:, radius == 2].mean(1, keepdims=True), 4, 1),
            rtol=1e-5,
        )
        np.testing.assert_array_equal(found[:, 0, 0], own[:, 0, 0])


def test_three_channels_become_brightness_and_opponent_colours():
    grey = jnp.ones((1, 4, 4, 3))
    apart = build("dct_global", colours=False).frame((4, 4, 3)).forward(grey)
    joint = build("dct_global").frame((4, 4, 3)).forward(grey)
    assert np.count_nonzero(np.abs(apart) > 1e-5) == 3
    assert np.count_nonzero(np.abs(joint) > 1e-5) == 1


@pytest.mark.parametrize("name", FRAMES)
def test_data_variances_are_those_along_each_coefficient(name):
    frame = build(name).frame((4, 4, 1))
    x = 0.5 * np.asarray(arrays(6, (4, 4, 1), 4096))
    nested = frames.data_variances(frame, x)
    hash(nested)
    found = np.asarray(nested)
    np.broadcast_to(found, frame.size)
    # Of 4096 examples: 5 standard errors of a variance of 0.25.
    np.testing.assert_allclose(found, 0.25, rtol=5 * (2 / 4096) ** 0.5)


@functools.cache
def covariance():
    root = np.random.default_rng(0).normal(size=(64, 64)) / 8
    return (root @ root.T).astype(np.float32)


def test_lanczos_with_all_products_equals_the_oracle():
    # Rank 7 and one eigenvalue 0: exhausted after 8 products.
    matrix = np.linalg.eigh(covariance())[1][:, :7]
    matrix = jnp.asarray(matrix * np.arange(1.0, 8.0) @ matrix.T, jnp.float32)

    def jacobian(v):
        flat = v.reshape(v.shape[0], -1)
        return jnp.matmul(flat, matrix, precision="highest").reshape(v.shape)

    @jax.jit
    def draws(keys):
        lanczos = [build("lanczos", num_products=m) for m in (8, 12, 2)]
        return [draw(b, jacobian, keys) for b in (build("oracle"), *lanczos)]

    expected, found, further, short = draws(KEYS)
    # The square root of an eigenvalue 0 is that of its rounding, 1e-6.
    np.testing.assert_allclose(found, expected, atol=5e-3)
    np.testing.assert_allclose(further, expected, atol=5e-3)
    assert np.abs(short - expected).max() > 0.05


@pytest.mark.parametrize(
    ("eigenvalues", "tolerance"),
    # The square root of an eigenvalue 0 is that of its rounding.
    [((0.37, 0.37), 1e-5), ((0.37, 0.9, 0.37), 1e-4), ((0.9, 0.0), 5e-3)],
)
def test_lanczos_is_exact_with_more_products_than_it_needs(eigenvalues, tolerance):
    values, shape = jnp.array(eigenvalues), (len(eigenvalues),)
    keys = jax.random.split(jax.random.key(3), 64)

    @jax.jit
    def draws(keys):
        found = [
            draw(build("lanczos", num_products=m), lambda v: values * v, keys, shape)
            for m in (3, 5)
        ]
        return base.normal(base.fold(keys, 1), shape), found

    xi, found = draws(keys)
    expected = np.sqrt(eigenvalues) * xi
    for noise in found:
        np.testing.assert_allclose(noise, expected, atol=tolerance)


def test_a_part_of_the_jacobian_that_is_not_symmetric_is_dropped():
    skew = np.triu(covariance(), 1) - np.tril(covariance(), -1)

    def jacobian(v, matrix):
        flat = v.reshape(v.shape[0], -1)
        return jnp.matmul(flat, matrix.T, precision="highest").reshape(v.shape)

    @jax.jit
    def noise(matrix):
        return draw(build("oracle"), functools.partial(jacobian, matrix=matrix))

    plain, twisted = noise(covariance()), noise(covariance() + skew)
    np.testing.assert_allclose(plain, twisted, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "shape", "match"),
    [
        ("dct_block", dict(block=3), SHAPE, "block: must divide .* got 3"),
        ("dct_conv", dict(block=5), SHAPE, "block: must be at most .* got 5"),
        ("oracle", dict(num_products=8), SHAPE, "num_products: must be the 64 entries"),
    ],
)
def test_an_unsuitable_shape_is_refused(name, options, shape, match):
    with pytest.raises(ValueError, match=match):
        build(name, **options).check(shape)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dct_block", dict(block=0)),
        ("dct_conv", dict(window=0)),
        ("lanczos", dict(num_products=0)),
        ("oracle", dict(num_products=65)),
    ],
)
def test_a_number_out_of_range_is_refused(name, options):
    (key,) = options
    with pytest.raises(ValueError, match=f"config.sampler.basis.{key}: "):
        build(name, **options)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_basis_accepts_the_shapes_it_can_draw(name):
    build(name).check(SHAPE)
