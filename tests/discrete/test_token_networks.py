"""Networks of tokens: what they see, what they cost, and what they score."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffusionlab import registry, sharding
from diffusionlab.models import network
from diffusionlab.processes.categorical import Categorical
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.alpha import Linear
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.settings import LOGICAL_AXES, Mesh
from diffusionlab.types import DataSpec, path_name

NAMES = ("token_transformer", "causal_transformer")
TEXT = DataSpec((10,), num_tokens=7)
# Pixels as tokens, of classes.
IMAGE, LEVELS = DataSpec((3, 4, 2), 3), 5
SIZES = dict(width=16, num_layers=2, num_heads=2, mlp_ratio=2)
BATCH = 8


def make(name, spec=TEXT, dtype="float32", noise="masked", **options):
    levels = 0 if spec.num_tokens else LEVELS
    process = Categorical(spec=spec, schedule=Linear(), noise=noise, levels=levels)
    block = {"name": name, **SIZES, **options}
    context = dict(spec=spec, dtype=dtype, process=process, source=None)
    module = registry.build("network", block, "config.networks.x", **context)
    return network.as_network(module, spec)


@functools.cache
def shapes(name, *args, **options):
    return jax.eval_shape(make(name, *args, **options).init, jax.random.key(0))


@functools.cache
def trained(name, *args, **options):
    """Parameters away from the zeros they start with; by NumPy, nothing to compile."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scale = path_name(path).endswith("scale")
        return np.float32(scale + rng.normal(size=leaf.shape) / 3)

    return jax.tree_util.tree_map_with_path(draw, shapes(name, *args, **options))


def inputs(spec=TEXT):
    rng = np.random.default_rng(2)
    num = spec.num_tokens or LEVELS
    z = jnp.asarray(rng.integers(0, num, (BATCH, *spec.shape)), jnp.int32)
    cond = {"t": jnp.linspace(0, 1, BATCH), "logsnr": jnp.linspace(-5, 5, BATCH)}
    if spec.num_classes:
        cond["label"] = jnp.arange(BATCH, dtype=jnp.int32) % (spec.num_classes + 1)
    return z, cond


@functools.cache
def apply(name, *args, **options):
    return jax.jit(make(name, *args, **options).apply, static_argnames="train")


@functools.cache
def output(name, spec=TEXT, dtype="float32", **options):
    params = trained(name, spec, **options)
    return np.asarray(apply(name, spec, dtype, **options)(params, *inputs(spec)))


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def influence(name):
    """[i, j]: whether the answer at position i changes with token j."""
    run, params, (z, cond) = apply(name), trained(name), inputs()
    length = TEXT.shape[0]
    # Every position changed in a copy of its own: one call, of one example each.
    rows = jnp.repeat(z[:1], length + 1, axis=0)
    moved = (rows + jnp.eye(length + 1, length, dtype=jnp.int32)) % TEXT.num_tokens
    cond = {k: jnp.repeat(v[:1], length + 1, axis=0) for k, v in cond.items()}
    answers = np.asarray(run(params, moved, cond))
    return (np.abs(answers[:-1] - answers[-1]).max(-1) > 1e-6).T


def test_what_diffuses_sees_every_token():
    assert influence("token_transformer").all()


def test_what_is_causal_sees_the_tokens_before():
    """And only those: exactly zero, not small, of the token itself and later ones."""
    length = TEXT.shape[0]
    before = np.tri(length, k=-1, dtype=bool)
    np.testing.assert_array_equal(influence("causal_transformer"), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [TEXT, IMAGE], ids=["text", "image"])
def test_answers_are_float32_logits_of_every_token(name, spec):
    num = spec.num_tokens or LEVELS
    assert output(name, spec).shape == (BATCH, *spec.shape, num)
    assert output(name, spec).dtype == np.float32
    axes, used = make(name, spec).param_axes, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(name, spec)):
        assert leaf.dtype == jnp.float32
        matches = [rule for rule in axes if re.search(rule[0], path_name(path))]
        used.update(matches[:1])
    assert used == set(axes)
    assert {a for _, logical in axes for a in logical if a} <= set(LOGICAL_AXES)


def test_a_network_starts_uniform_and_noise_changes_nothing():
    name, options = "token_transformer", dict(noise_input=3)
    params = jax.jit(make(name, **options).init)(jax.random.key(0))
    np.testing.assert_array_equal(params["noise"]["kernel"], 0)
    for leaf in jax.tree.leaves(params["head"]):
        np.testing.assert_array_equal(leaf, 0)
    z, cond = inputs()
    scored = apply(name, **options)(params, z, {**cond, "target": z})
    np.testing.assert_allclose(scored, -np.log(TEXT.num_tokens), rtol=1e-6)


def test_the_mask_is_a_symbol_of_its_own():
    for noise, symbols in (("masked", 8), ("uniform", 7)):
        table = shapes("token_transformer", noise=noise)["table"]["embedding"]
        assert table.shape == (symbols, SIZES["width"])
    z, cond = inputs()
    hidden = jnp.full_like(z, TEXT.num_tokens)
    run, params = apply("token_transformer"), trained("token_transformer")
    last = jnp.full_like(z, TEXT.num_tokens - 1)
    assert distance(run(params, hidden, cond), run(params, last, cond)) > 0.1


def test_time_is_seen_where_it_is_asked_for():
    (z, cond), name = inputs(), "token_transformer"
    turned = {k: jnp.roll(v, 1) for k, v in cond.items()}
    seen = apply(name)(trained(name), z, turned)
    assert distance(seen, output(name)) > 1e-2
    told = trained(name, time_conditioning=False)
    blind = apply(name, time_conditioning=False)
    np.testing.assert_array_equal(blind(told, z, {}), blind(told, z, turned))
    paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(told)]
    assert not any("modulation" in path or "embedding/in" in path for path in paths)


def test_a_label_is_seen_without_the_time():
    z, cond = inputs(IMAGE)
    options = dict(time_conditioning=False)
    run = apply("token_transformer", IMAGE, **options)
    params = trained("token_transformer", IMAGE, **options)
    found = run(params, z, {"label": cond["label"]})
    turned = run(params, z, {"label": jnp.roll(cond["label"], 1)})
    assert distance(turned, found) > 1e-2
    assert "in" not in params["embedding"] and "label" in params["embedding"]


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_parameters_is_known(name):
    d, k, r, n = 16, TEXT.num_tokens, SIZES["mlp_ratio"], SIZES["num_layers"]
    head = d // SIZES["num_heads"]
    # Attention without bias but for its output; one norm of queries, one of keys.
    block = 4 * d * d + d + 2 * head + 2 * r * d * d + r * d + d
    total = n * block + (k + 1) * d + d * k + k
    if name == "token_transformer":
        # The noise level: 16 features, two dense layers; every block is modulated.
        total += 2 * (d * d + d) + n * 6 * (d * d + d) + 2 * (d * d + d)
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes(name)))
    assert found == total


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32(name):
    # The rounding of a product is 2^-8; a few of them, one after the other.
    error = distance(output(name, dtype="bfloat16"), output(name))
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name, spec", [(NAMES[0], IMAGE), (NAMES[1], TEXT)])
def test_a_network_scores_targets_by_its_logits(name, spec):
    z, cond = inputs(spec)
    target = (z + 1) % 3
    net = apply(name, spec, chunk=4)
    scored = net(trained(name, spec), z, {**cond, "target": target})
    log_probs = np.asarray(jax.nn.log_softmax(output(name, spec)))
    own = np.take_along_axis(log_probs, np.asarray(target)[..., None], -1)[..., 0]
    assert scored.shape == z.shape and scored.dtype == jnp.float32
    np.testing.assert_allclose(scored, own, rtol=1e-4, atol=1e-4)
    assert make(name).scores_targets
    assert make(name).is_causal == (name == "causal_transformer")


def temporaries(chunk, num_tokens, length, width):
    """Bytes that a gradient of scores needs besides its arguments and answers."""
    spec = DataSpec((length,), num_tokens=num_tokens)
    net = make(
        "causal_transformer", spec, width=width, num_layers=1, num_heads=1, chunk=chunk
    )

    def loss(params, x):
        return net.apply(params, x, {"target": x}).sum()

    params = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_large_vocabulary_is_never_held_for_all_positions():
    num_tokens, length, width, chunk = 50_257, 1024, 8, 64
    logits = 4 * length * num_tokens
    # Logits, their exponentials and their gradient, of one chunk; the gradient of the
    # head, summed up and new, and of the table; scores of attention, and gradients.
    held = 4 * (3 * chunk + 4 * width) * num_tokens + 4 * 4 * length * length
    assert held < logits / 3
    assert temporaries(chunk, num_tokens, length, width) < held
    assert temporaries(0, num_tokens, length, width) > logits


def test_noise_is_added_and_none_is_zero():
    name, options = "token_transformer", dict(noise_input=3)
    run, (z, cond) = apply(name, **options), inputs()
    params = trained(name, **options)
    rng = np.random.default_rng(4)
    noise = jnp.asarray(rng.normal(size=(*z.shape, 3)), jnp.float32)
    without = run(params, z, cond)
    np.testing.assert_array_equal(run(params, z, {**cond, "noise": 0 * noise}), without)
    assert distance(run(params, z, {**cond, "noise": noise}), without) > 0.05
    # As it starts, noise changes nothing: the rest is the network without an input.
    rest = {k: v for k, v in params.items() if k != "noise"}
    plain = apply(name)(rest, z, cond)
    start = {**rest, "noise": jax.tree.map(np.zeros_like, params["noise"])}
    found = run(start, z, {**cond, "noise": noise})
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


def test_dropout_acts_when_training_and_by_its_key():
    name, options = "token_transformer", dict(dropout=0.5)
    z, cond = inputs()
    params, run = trained(name), apply(name, **options)
    a, b = jax.random.key(0), jax.random.key(1)
    dropped = run(params, z, cond, train=True, key=a)
    np.testing.assert_array_equal(dropped, run(params, z, cond, train=True, key=a))
    assert distance(dropped, run(params, z, cond, train=True, key=b)) > 1e-3
    np.testing.assert_allclose(run(params, z, cond), output(name), rtol=1e-5, atol=1e-6)


@functools.cache
def gradient(name, **options):
    net, (z, cond) = make(name, **options), inputs()

    def loss(params):
        scored = net.apply(params, z, {**cond, "target": z})
        return jnp.mean(scored**2), scored

    return jax.jit(jax.grad(loss, has_aux=True))(trained(name))


def test_unrolling_and_remat_change_no_number_and_all_is_used():
    name = "token_transformer"
    found = gradient(name, unroll=True, remat="dots_with_no_batch_dims_saveable")
    close(found, gradient(name), rtol=1e-3, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found[0]):
        assert np.abs(leaf).max() > 0, path_name(path)


RULES = {**Mesh().rules, "vocab": "tensor"}


def test_sharded_equals_unsharded():
    """The vocabulary too; 7 tokens do not divide, 8 symbols do, so there are both."""
    name, chunk = "token_transformer", 4
    settings = Mesh(data=2, fsdp=2, tensor=2, rules=RULES)
    mesh, net = sharding.make_mesh(settings), make(name, chunk=chunk)
    params = trained(name)
    places = sharding.place_tree(params, net.param_axes, settings.rules, mesh)
    assert places["table"]["embedding"].spec == P("tensor", "fsdp")
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.follow(params, params, places, mesh))
        z, cond = jax.device_put(inputs(), sharding.batch_sharding(mesh))

        def loss(params):
            scored = net.apply(params, z, {**cond, "target": z})
            return jnp.mean(scored**2), scored

        found = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(found, gradient(name), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("token_transformer", dict(num_heads=3), "num_heads: 3 does not divide"),
        ("token_transformer", dict(num_heads=16), "num_heads: leaves 1 features"),
        ("causal_transformer", dict(chunk=-1), "chunk: must be at least 0, got -1"),
        ("token_transformer", dict(noise_input=-1), "noise_input: must be at least 0"),
        ("causal_transformer", dict(remat="dots"), "remat: unknown policy 'dots'"),
        ("token_transformer", dict(num_layers=0), "num_layers: must be at least 1, g"),
        ("causal_transformer", dict(mlp_ratio=0), "mlp_ratio: must be at least 1, go"),
        ("token_transformer", dict(dropout=1.5), r"dropout: must be in \[0, 1\), got"),
        ("dit", {}, r"name: 'dit' is for images \[H, W, C\], .* are tokens \(10,\)"),
        ("peebles_dit", {}, "name: 'peebles_dit' is for images"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(name, options, said):
    with pytest.raises(ValueError, match=said):
        make(name, **options)


def test_data_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="leaves 4 features .* at least 6"):
        make("token_transformer", IMAGE, num_heads=4)
    process = Gaussian(schedule=Cosine(), prediction="v")
    context = dict(spec=IMAGE, dtype="float32", process=process, source=None)
    for name in NAMES:
        with pytest.raises(ValueError, match="needs the process 'categorical'"):
            registry.build("network", {"name": name}, "config.networks.x", **context)
