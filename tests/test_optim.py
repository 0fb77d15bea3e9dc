import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusionlab import experiment, optim, sharding
from diffusionlab import state as state_lib
from diffusionlab.settings import Mesh, Optimizer
from diffusionlab.types import path_name

RATE = dict(name="constant", value=0.1)
PATH = "config.optim.denoiser"


def tree():
    return {
        "block": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    }


def settings(name="sgd", **kw):
    return Optimizer(**{"name": name, "learning_rate": RATE, "clip_norm": 0.0, **kw})


def moves(block, grads, params=None):
    """What one step adds to the parameters."""
    params = tree() if params is None else params
    optimizer = optim.make(block, params, PATH)

    @jax.jit
    def step(grads, params):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    return step(grads, params)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_known_optimiser_goes_downhill(name):
    rate = dict(name="constant", value=0.01)
    optimizer = optim.make(settings(name, learning_rate=rate), tree(), PATH)
    params, state = tree(), optimizer.init(tree())

    def loss(params):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = loss(params)
    for _ in range(5):
        params, state = step(params, state)
    assert loss(params) < start
    unmoved = [np.allclose(a, 1.0) for a in jax.tree.leaves(params)]
    assert not any(unmoved)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_weight_decays_only_where_the_pattern_matches(name):
    zeros = jax.tree.map(jnp.zeros_like, tree())
    block = settings(name, weight_decay=0.5, decay_on=("block/kernel$",))
    found = moves(block, zeros)
    np.testing.assert_allclose(found["block"]["kernel"], -0.05, rtol=1e-6)
    for leaf in (found["block"]["bias"], found["head"]["kernel"]):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_weight_decay_zero_is_none_whatever_optax_thinks(name):
    zeros = jax.tree.map(jnp.zeros_like, tree())
    for leaf in jax.tree.leaves(moves(settings(name), zeros)):
        np.testing.assert_array_equal(leaf, 0)


def test_weight_decay_of_an_optimiser_that_has_none_is_an_error():
    with pytest.raises(ValueError, match="denoiser.weight_decay: 'adam' has none; use"):
        optim.make(settings("adam", weight_decay=0.1), tree(), PATH)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("adamw", "weight_decay"),
        ("adamw", "mask"),
        ("lamb", "mask"),
        ("muon", "weight_decay_mask"),
        ("muon", "adam_weight_decay"),
        ("adafactor", "weight_decay_rate"),
        ("adam", "learning_rate"),
    ],
)
def test_option_that_has_a_key_of_its_own_is_refused(name, key):
    instead = "learning_rate" if key == "learning_rate" else "weight_decay"
    match = f"^{PATH}.options.{key}: set {PATH}.{instead} "
    with pytest.raises(ValueError, match=match):
        optim.make(settings(name, options={key: 0.1}), tree(), PATH)


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_muon_decays_what_others_decay_and_at_the_same_rate(name):
    """Also what it leaves to Adam."""
    zeros = jax.tree.map(jnp.zeros_like, tree())
    rate = dict(name="linear", value=0.1, decay_steps=4)
    found = []
    for each in (name, "muon"):
        block = settings(
            each, learning_rate=rate, weight_decay=0.5, decay_on=("block/", "head/bias")
        )
        params = tree()
        optimizer = optim.make(block, params, PATH)
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(zeros, state, params)
            params = optax.apply_updates(params, updates)
        found.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)
    assert np.all(found[1]["head"]["bias"] < 0.9)


def network(smoke, name, *overrides):
    config = smoke(name, "networks.denoiser.num_layers=3", *overrides)
    built = experiment.build(config)
    return built, state_lib.abstract_params(built)["denoiser"]


def partition(params):
    """{path: (shape of a stack, shape read, shape written) or None}."""
    found = {}

    def note(path, leaf, axes):
        if axes is not None:
            read, written = (
                [a % len(leaf.shape) for a in axis]
                for axis in (axes.reduction_axis, axes.output_axis)
            )
            rest = set(range(len(leaf.shape))) - {*read, *written}
            axes = tuple(
                tuple(leaf.shape[a] for a in chosen)
                for chosen in (sorted(rest), read, written)
            )
        found[path_name(path)] = axes

    jax.tree_util.tree_map_with_path(note, params, optim.matrix_axes(params))
    return found


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_muon_takes_every_kernel_as_its_matrix_and_nothing_else(smoke, name):
    found = partition(network(smoke, name)[1])
    for path, axes in found.items():
        kernel, stacked = path.endswith("/kernel"), path.startswith("transformer/block")
        assert (axes is not None) == kernel, path
        if kernel:
            assert axes[0] == ((3,) if stacked else ()), path
    block = "transformer/block"
    for part in ("query", "key", "value"):
        assert found[f"{block}/attention/{part}/kernel"] == ((3,), (16,), (4, 4))
    assert found[f"{block}/attention/out/kernel"] == ((3,), (4, 4), (16,))
    assert found[f"{block}/mlp/up/kernel"] == ((3,), (16,), (64,))
    assert found[f"{block}/modulation/kernel"] == ((3,), (16,), (96,))
    assert found["embedding/out/kernel"] == ((), (16,), (16,))
    if name == "photos":
        assert found["down_0_0/conv1/kernel"] == ((), (3, 3, 8), (8,))
        assert found["pool_0/kernel"] == ((), (1, 1, 8), (16,))
    left = {path.rpartition("/")[2] for path, axes in found.items() if axes is None}
    assert left >= {"bias", "scale", "position"}


def test_muon_orthogonalises_each_matrix_of_a_stack_by_itself(smoke):
    params = network(smoke, "digits")[1]
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
    found = moves(settings("muon"), grads, grads)
    kernel = found["transformer"]["block"]["mlp"]["up"]["kernel"] / 0.1
    # muon scales the 16 x 64 matrix by 2; its singular values are near 1, not equal.
    for matrix in kernel:
        values = np.linalg.svd(matrix, compute_uv=False) / 2
        assert values.min() > 0.5 and values.max() < 1.3
    # Adam's first step has one size whatever the gradient.
    for leaf in (found["position"], found["transformer"]["block"]["mlp"]["up"]["bias"]):
        np.testing.assert_allclose(jnp.abs(leaf), jnp.abs(leaf).mean(), rtol=1e-3)


def test_a_kernel_without_a_bias_is_dense_or_a_convolution_and_may_be_stacked():
    shapes = {"dense": (4, 6), "conv": (3, 3, 4, 6), "out": (4, 6)}
    shapes |= {f"{name}s": (2, *shape) for name, shape in shapes.items()}
    params = {n: {"kernel": jnp.zeros(shape)} for n, shape in shapes.items()}
    found = partition(params | {"odd": {"kernel": jnp.zeros(3)}})
    assert found.pop("odd/kernel") is None
    for name, axes in found.items():
        read = (3, 3, 4) if name.startswith("conv") else (4,)
        stack = (2,) if name.endswith("s/kernel") else ()
        assert axes == (stack, read, (6,)), name


def test_a_bias_tells_the_stack():
    """Two axes of stack, and a convolution over a line."""
    params = {
        "dense": {"kernel": jnp.zeros((2, 3, 4, 6)), "bias": jnp.zeros((2, 3, 6))},
        "conv": {"kernel": jnp.zeros((3, 4, 6)), "bias": jnp.zeros(6)},
    }
    found = partition(params)
    assert found["dense/kernel"] == ((2, 3), (4,), (6,))
    assert found["conv/kernel"] == ((), (3, 4), (6,))


def test_own_choice_of_matrices_overrides():
    ones = jax.tree.map(jnp.ones_like, tree())
    nothing = jax.tree.map(lambda _: None, tree())
    block = settings("muon", options=dict(muon_weight_dimension_numbers=nothing))
    found, usual = moves(block, ones)["head"], moves(settings("muon"), ones)["head"]
    np.testing.assert_allclose(found["kernel"], found["bias"][0], rtol=1e-6)
    assert not np.allclose(usual["kernel"], usual["bias"][0], rtol=0.1)


def test_multipliers_scale_the_learning_rate_and_zero_freezes():
    ones = jax.tree.map(jnp.ones_like, tree())
    pairs = (("head/", 0.5), ("bias$", 0.0), ("head/kernel", 0.5))
    found = moves(settings(multipliers=pairs), ones)
    np.testing.assert_allclose(found["block"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["kernel"], -0.1 * 0.25, rtol=1e-6)
    np.testing.assert_array_equal(found["block"]["bias"], 0)
    np.testing.assert_array_equal(found["head"]["bias"], 0)


def test_zero_freezes_against_weight_decay_too():
    ones = jax.tree.map(jnp.ones_like, tree())
    block = settings("adamw", weight_decay=0.5, multipliers=(("head", 0.0),))
    np.testing.assert_array_equal(moves(block, ones)["head"]["kernel"], 0)


@pytest.mark.parametrize(
    "option, where",
    [
        (dict(decay_on=("kernle",), weight_decay=0.1), "decay_on"),
        (dict(decay_on=("kernle",)), "decay_on"),
        (dict(multipliers=(("kernle", 0.1),)), "multipliers"),
    ],
)
def test_pattern_that_matches_nothing_is_an_error_with_near_paths(option, where):
    with pytest.raises(ValueError) as error:
        optim.make(settings("adamw", **option), tree(), PATH)
    assert f"{PATH}.{where}: pattern 'kernle' matches no parameter" in str(error.value)
    assert "of the 4 paths: " in str(error.value) and "head/kernel" in str(error.value)


def test_pattern_that_is_none_is_an_error():
    with pytest.raises(ValueError, match=r"denoiser.multipliers: '\(' is no pattern"):
        optim.make(settings(multipliers=(("(", 1.0),)), tree(), PATH)


def test_gradient_is_clipped_to_exactly_the_global_norm():
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), tree())
    clipped = moves(settings(clip_norm=0.7), grads)
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.1 * 0.7, rtol=1e-6)
    whole = moves(settings(clip_norm=1e4), grads)
    np.testing.assert_allclose(optax.tree.norm(whole), 0.3 * 30**0.5, rtol=1e-6)
    off = moves(settings(clip_norm=0.0), grads)
    np.testing.assert_array_equal(off["head"]["bias"], whole["head"]["bias"])


def test_default_pattern_needs_a_match_only_where_it_is_used():
    params = {"table": jnp.ones((2, 2))}
    optim.make(settings("adamw"), params, PATH)
    with pytest.raises(ValueError, match="decay_on: pattern '.*' matches no parameter"):
        optim.make(settings("adamw", weight_decay=0.1), params, PATH)


@pytest.mark.parametrize("name", ["lin", "rprop", "sm3", "lbfgs", "global_norm"])
def test_unknown_optimiser_is_an_error_with_the_known(name):
    with pytest.raises(ValueError, match=f"^{PATH}.name: no optimiser '{name}'") as e:
        optim.make(settings(name), tree(), PATH)
    known = str(e.value).partition("Known: ")[2].partition(";")[0].split(", ")
    assert known == sorted(optim.OPTIMIZERS) and "muon" in known
    assert ("did you mean 'lion'" in str(e.value)) == (name == "lin")


@pytest.mark.parametrize(
    "name",
    ["optax:lbfgs", "optax:sm3", "optax.contrib:momo", "optax.contrib:sophia",
     "optax.contrib:dpsgd", "optax:global_norm", "optax:nothing", "no.such:module",
     f"{__name__}:RATE", f"{__name__}:uncounted"],
)  # fmt: skip
def test_optimiser_that_cannot_train_is_refused_when_built(name):
    """Each would break at the first step, or later; one line, with its path."""
    rate = dict(name="constant", value=0.1, warmup_steps=2)
    with pytest.raises(ValueError, match=rf"^{PATH}\.name: .*\.$") as error:
        optim.make(settings(name, learning_rate=rate), tree(), PATH)
    assert "\n" not in str(error.value)


def test_other_optimisers_of_optax_come_by_their_module():
    ones = jax.tree.map(jnp.ones_like, tree())
    assert np.all(moves(settings("optax:yogi"), ones)["head"]["kernel"] < 0)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("adam", "b2", "abc"),
        ("adamw", "eps", [1, 2, 3]),
        ("adam", "mu_dtype", "float33"),
        ("muon", "ns_coeffs", "no preset"),
        ("muon", "preconditioning", "none"),
        ("sgd", "momentum", "heavy"),
    ],
)
def test_value_that_an_option_cannot_take_is_one_line_with_its_path(name, key, value):
    with pytest.raises(ValueError) as error:
        optim.make(settings(name, options={key: value}), tree(), PATH)
    said = str(error.value)
    assert said.startswith(f"{PATH}.options.{key}: '{name}' cannot use {value!r}: ")
    assert "\n" not in said


def test_unknown_option_is_an_error_with_the_nearest_and_the_accepted():
    with pytest.raises(ValueError) as error:
        optim.make(settings("adam", options={"b_2": 0.9}), tree(), PATH)
    assert str(error.value).startswith(
        f"{PATH}.options.b_2: unknown option of 'adam'; did you mean 'b2'? Accepted: "
    )


def test_options_reach_the_optimiser():
    plain, ones = settings(), jax.tree.map(jnp.ones_like, tree())
    momentum = settings(options=dict(momentum=0.9))
    params = tree()
    optimizer = optim.make(momentum, params, PATH)
    state = optimizer.init(params)
    first, state = optimizer.update(ones, state, params)
    second, _ = optimizer.update(ones, state, params)
    np.testing.assert_array_equal(
        first["head"]["bias"], moves(plain, ones)["head"]["bias"]
    )
    np.testing.assert_allclose(second["head"]["bias"], -0.19, rtol=1e-6)


def doubled_sgd(learning_rate):
    return optax.sgd(lambda count: 2 * learning_rate(count))


def test_optimiser_from_elsewhere_plugs_in():
    ones = jax.tree.map(jnp.ones_like, tree())
    found = moves(settings(f"{__name__}:doubled_sgd"), ones)
    np.testing.assert_allclose(found["head"]["bias"], -0.2, rtol=1e-6)


def uncounted(learning_rate):
    """The averages and the schedule of a role are told its updates by their count."""
    return optax.scale(-float(learning_rate(0)))


def test_muon_state_lies_with_its_parameters(smoke):
    built, params = network(
        smoke, "photos", "optim.denoiser.name=muon", "optim.denoiser.options={}"
    )
    state = state_lib.abstract(built, sharding.make_mesh(Mesh(data=1, fsdp=8)))
    where = {
        path_name(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    part = "transformer/block/mlp/up/kernel"
    (found,) = [spec for path, spec in where.items() if path.endswith(part)]
    wanted = state.params["denoiser"]["transformer"]["block"]["mlp"]["up"]["kernel"]
    assert found == wanted.sharding.spec and "fsdp" in found
