"""Claims about every registered network; a new one needs a line in TOYS."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry, sharding
from diffusionlab.data.generated import Mixture
from diffusionlab.models import layers, network
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.settings import LOGICAL_AXES, Mesh
from diffusionlab.types import DataSpec, path_name

IMAGE = DataSpec((8, 8, 3), 4)
VECTOR = DataSpec((6,), 4)
TOYS = {
    "dit": (IMAGE, dict(patch_size=4, width=16, num_layers=2, num_heads=2)),
    "gaussian": (VECTOR, dict(per_class=True)),
    "gaussian_mixture": (VECTOR, {}),
    "mlp": (VECTOR, dict(width=16, num_layers=2)),
    "peebles_dit": (IMAGE, dict(patch_size=4, width=16, num_layers=2, num_heads=2)),
    "uncertainty": (VECTOR, dict(width=16)),
    "uvit": (
        IMAGE,
        dict(
            channels=(8, 8), num_blocks=1, width=16, num_layers=2, num_heads=2,
            emb_width=16, dropout=0.0,
        ),
    ),
}  # fmt: skip
# What tells the noise level, where that is not logsnr.
LEVEL = {"peebles_dit": "t"}
# They answer exactly from the start, in float32 and without labels to drop; what holds
# of them is in test_analytic.py.
EXACT = ("gaussian", "gaussian_mixture")
# One number per example from logsnr alone, for the loss and not for samples.
SCALAR = ("uncertainty",)
# They answer with logits, not with data; they have tests of their own.
LOGITS = (
    "causal_transformer",
    "classifier",
    "discriminator",
    "token_transformer",
)
NAMES = sorted({*registry.table("network")} - {*EXACT, *SCALAR, *LOGITS})
BATCH = 8


PROCESS = Gaussian(schedule=Cosine(), prediction="v")
SOURCE = Mixture(dimension=6, num_components=4, std=0.5, size=256)


def accepting(key):
    where = registry.table("network")
    return [name for name in NAMES if key in registry.parameters(where[name])]


@functools.cache
def make(name, dtype="float32", num_classes=4, **options):
    spec, sizes = TOYS[name]
    spec = spec._replace(num_classes=num_classes)
    block = {"name": name, **sizes, **options}
    context = dict(spec=spec, dtype=dtype, process=PROCESS, source=SOURCE)
    module = registry.build("network", block, "config.networks.x", **context)
    return network.as_network(module, spec)


@functools.cache
def init(name):
    return jax.jit(make(name).init)


@functools.cache
def apply(name, dtype="float32", **options):
    """Traced once for all tests."""
    return jax.jit(make(name, dtype, **options).apply, static_argnames="train")


@functools.cache
def start(name):
    return init(name)(jax.random.key(0))


@functools.cache
def trained(name):
    """Parameters away from the zeros they start with."""
    # Not drawn by JAX, which compiles that for every shape.
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: np.asarray(p) + np.float32(0.1 * rng.normal(size=p.shape)),
        start(name),
    )


@functools.cache
def inputs(name):
    spec, _ = TOYS[name]
    z = jax.random.normal(jax.random.key(2), (BATCH, *spec.shape))
    label = jnp.arange(BATCH, dtype=jnp.int32) % (spec.num_classes + 1)
    logsnr = jnp.linspace(-10, 10, BATCH)
    return z, {"t": jnp.linspace(0, 1, BATCH), "logsnr": logsnr, "label": label}


@functools.cache
def output(name, dtype="float32", **options):
    return np.asarray(apply(name, dtype, **options)(trained(name), *inputs(name)))


@functools.cache
def gradient(name, **options):
    net = make(name, **options)

    def loss(params):
        return jnp.mean(net.apply(params, *inputs(name)) ** 2)

    return jax.jit(jax.grad(loss))(trained(name))


def close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", NAMES)
def test_output_is_float32_and_shaped_as_the_data(name):
    assert output(name).shape == inputs(name)[0].shape
    for dtype in ("float32", "bfloat16"):
        raw = jax.eval_shape(make(name, dtype).apply, start(name), *inputs(name))
        assert raw.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(start(name))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_answer_is_float32_and_shaped_as_the_data(name):
    assert output(name).shape == inputs(name)[0].shape
    assert output(name).dtype == jnp.float32


@pytest.mark.parametrize("name", SCALAR)
def test_a_scalar_is_float32_per_example_and_looks_at_logsnr_alone(name):
    z, cond = inputs(name)
    for dtype in ("float32", "bfloat16"):
        found = apply(name, dtype)(trained(name), 0 * z, cond)
        assert found.shape == (BATCH,) and found.dtype == jnp.float32
        np.testing.assert_array_equal(found, output(name))
    turned = {**cond, "logsnr": jnp.roll(cond["logsnr"], 1)}
    moved = apply(name)(trained(name), z, turned)
    np.testing.assert_allclose(moved, np.roll(output(name), 1), rtol=1e-5)
    others = {**cond, "label": 0 * cond["label"], "t": 0 * cond["t"]}
    same = apply(name)(trained(name), z, others)
    np.testing.assert_array_equal(same, output(name))


@pytest.mark.parametrize("name", [*NAMES, *SCALAR])
def test_network_starts_at_zero_and_leaves_it(name):
    raw = apply(name)(start(name), *inputs(name))
    np.testing.assert_array_equal(raw, 0)
    assert np.abs(output(name)).max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_initialisation_is_a_function_of_the_key(name):
    # Traced again, from a network made again.
    again = jax.jit(make.__wrapped__(name).init)
    close(again(jax.random.key(0)), start(name), rtol=0, atol=0)
    other = jax.tree.leaves(init(name)(jax.random.key(1)))
    pairs = zip(other, jax.tree.leaves(start(name)), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_see_each_other_but_their_condition(name):
    net, params, (z, cond) = apply(name), trained(name), inputs(name)
    half = {k: v[:4] for k, v in cond.items()}
    close(net(params, z[:4], half), output(name)[:4], rtol=1e-4, atol=1e-5)
    for key in (LEVEL.get(name, "logsnr"), "label"):
        turned = net(params, z, {**cond, key: jnp.roll(cond[key], 1)})
        assert distance(turned, output(name)) > 1e-3, key


@pytest.mark.parametrize("name", NAMES)
def test_data_without_classes_need_no_label(name):
    net = make(name, num_classes=0)
    z, cond = inputs(name)
    params = jax.eval_shape(net.init, jax.random.key(0))
    raw = jax.eval_shape(
        net.apply, params, z, {"t": cond["t"], "logsnr": cond["logsnr"]}
    )
    assert raw.shape == z.shape


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32(name):
    error = distance(output(name, "bfloat16"), output(name))
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name", [*NAMES, *EXACT])
def test_forward_derivative_is_that_of_the_function(name):
    net, params, (z, cond) = make(name), trained(name), inputs(name)
    tangent = jax.random.normal(jax.random.key(3), z.shape)

    @jax.jit
    def derivatives(z):
        def f(z):
            return net.apply(params, z, cond)

        _, forward = jax.jvp(f, (z,), (tangent,))
        h = 1e-2
        return forward, (f(z + h * tangent) - f(z - h * tangent)) / (2 * h)

    forward, difference = derivatives(z)
    assert distance(np.asarray(forward), np.asarray(difference)) < 0.02


@pytest.mark.parametrize("name", [*NAMES, *EXACT, *SCALAR])
def test_every_parameter_gets_a_gradient(name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(name)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path_name(path)


@pytest.mark.parametrize("name", accepting("unroll"))
def test_unrolled_layers_equal_the_scan(name):
    close(output(name, unroll=True), output(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", accepting("remat"))
def test_remat_changes_no_number(name):
    rematted = gradient(name, remat="dots_with_no_batch_dims_saveable")
    close(rematted, gradient(name), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", accepting("dropout"))
def test_dropout_acts_only_when_training_and_by_its_key(name):
    def run(**kw):
        return np.asarray(apply(name, dropout=0.5)(trained(name), *inputs(name), **kw))

    a, b = jax.random.key(0), jax.random.key(1)
    dropped = run(train=True, key=a)
    np.testing.assert_array_equal(dropped, run(train=True, key=a))
    assert distance(dropped, run(train=True, key=b)) > 1e-3
    assert distance(dropped, output(name)) > 1e-3
    close(run(train=False, key=a), output(name), rtol=1e-5, atol=1e-6)
    close(run(train=True), output(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_is_the_first_to_match_a_parameter_of_its_rank(name):
    axes = make(name).param_axes
    used = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(start(name)):
        matches = [rule for rule in axes if re.search(rule[0], path_name(path))]
        used.update(matches[:1])
        assert not matches or len(matches[0][1]) <= leaf.ndim, path_name(path)
    assert used == set(axes)
    assert {a for _, logical in axes for a in logical if a} <= set(LOGICAL_AXES)


# Data alone are split in tests/integration/test_meshes.py.
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_sharded_equals_unsharded(name, sizes):
    settings = Mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    mesh, net, params = sharding.make_mesh(settings), make(name), trained(name)
    places = sharding.place_tree(params, net.param_axes, settings.rules, mesh)
    specs = {
        p.spec for p in jax.tree.leaves(places, is_leaf=lambda p: hasattr(p, "spec"))
    }
    assert (any("tensor" in spec for spec in specs)) == (sizes[2] > 1)
    assert (any("fsdp" in spec for spec in specs)) == (sizes[1] > 1)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.follow(params, params, places, mesh))
        args = jax.device_put(inputs(name), sharding.batch_sharding(mesh))

        def loss(params):
            raw = net.apply(params, *args)
            return jnp.mean(raw**2), raw

        grad, raw = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(raw, output(name), rtol=1e-3, atol=1e-5)
    close(grad, gradient(name), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("dit", dict(num_heads=3), r"x\.num_heads: 3 does not divide the width 16"),
        (
            "dit",
            dict(patch_size=3),
            r"x\.patch_size: 3 does not divide images of 8 by 8",
        ),
        (
            "dit",
            dict(remat="dots"),
            r"x\.remat: unknown policy 'dots'; known: .*saveable",
        ),
        ("uvit", dict(num_heads=3), r"x\.num_heads: 3 does not divide the width 16"),
        (
            "uvit",
            dict(channels=(8, 8, 8, 8)),
            r"x\.channels, patch_size: reduce the image",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(name, options, said):
    with pytest.raises(ValueError, match=said):
        make(name, **options)


def test_patches_come_back():
    z = jax.random.normal(jax.random.key(0), (2, 4, 8, 3))
    patches = layers.patchify(z, 2)
    assert patches.shape == (2, 2, 4, 12)
    np.testing.assert_array_equal(patches[0, 0, 1], z[0, :2, 2:4].ravel())
    np.testing.assert_array_equal(layers.unpatchify(patches, 2), z)


def test_hint_without_a_mesh_is_the_identity():
    x = jnp.ones((2, 3))
    assert layers.shard(x, "batch", "mlp") is x


def test_noise_level_features_tell_levels_apart_and_are_smooth():
    features = layers.fourier_features(jnp.array([-10.0, 0.0, 0.01, 10.0]), 32)
    assert features.shape == (4, 32) and features.dtype == jnp.float32
    np.testing.assert_allclose(features[1], [0.0] * 16 + [1.0] * 16, atol=1e-6)
    step = jnp.abs(features[2] - features[1]).max()
    assert step < 0.05 and jnp.abs(features[3] - features[0]).max() > 0.5
