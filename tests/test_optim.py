import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusionlab import optim, registry
from diffusionlab.settings import Optimizer

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
    return optimizer.update(grads, optimizer.init(params), params)[0]


def schedule(name, **kw):
    return registry.build("learning_rate", dict(name=name, **kw), "config.x")


@pytest.mark.parametrize(
    "name, options, points",
    [
        ("constant", {}, {0: 0.4, 99: 0.4}),
        ("constant", dict(warmup_steps=4), {0: 0.1, 1: 0.2, 3: 0.4, 4: 0.4, 9: 0.4}),
        ("constant", dict(warmup_steps=1), {0: 0.4, 1: 0.4}),
        ("linear", dict(decay_steps=8), {0: 0.4, 2: 0.3, 8: 0.0, 99: 0.0}),
        ("linear", dict(decay_steps=8, warmup_steps=4, final_value=0.2),
         {0: 0.1, 3: 0.4, 4: 0.4, 6: 0.3, 8: 0.2, 99: 0.2}),
        ("cosine", dict(decay_steps=8), {0: 0.4, 4: 0.2, 8: 0.0, 99: 0.0}),
        ("cosine", dict(decay_steps=12, warmup_steps=4, final_value=0.2),
         {0: 0.1, 3: 0.4, 4: 0.4, 8: 0.3, 12: 0.2, 99: 0.2}),
        ("inverse_sqrt", dict(warmup_steps=4), {0: 0.1, 3: 0.4, 4: 0.4, 16: 0.2}),
    ],
)  # fmt: skip
def test_schedule_has_its_value_at(name, options, points):
    rate = schedule(name, value=0.4, **options)
    for step, value in points.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), value, atol=1e-7)


def test_every_schedule_is_finite_and_never_negative():
    required = dict(value=0.3, decay_steps=20, warmup_steps=5)
    for name in registry.table("learning_rate"):
        accepted = registry.parameters(registry.table("learning_rate")[name])
        rate = schedule(name, **{k: v for k, v in required.items() if k in accepted})
        values = np.array([rate(jnp.int32(step)) for step in range(0, 60, 3)])
        assert np.isfinite(values).all() and (values >= 0).all(), name
        assert values.max() <= 0.3 + 1e-6, name


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_must_be_longer_than_warm_up(name):
    with pytest.raises(ValueError, match="config.x.decay_steps: must exceed warmup"):
        schedule(name, value=1.0, decay_steps=4, warmup_steps=4)


def test_inverse_sqrt_needs_warm_up():
    with pytest.raises(ValueError, match="config.x.warmup_steps: must be at least 1"):
        schedule("inverse_sqrt", value=1.0, warmup_steps=0)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "lion", "sgd", "adafactor"])
def test_optimiser_by_name_goes_downhill(name):
    decay = {} if name in ("adam", "sgd", "adafactor") else dict(weight_decay=1e-3)
    optimizer = optim.make(settings(name, **decay), tree(), PATH)
    params, state = tree(), optimizer.init(tree())

    def loss(params):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        new, state = step(params, state)
        assert loss(new) < loss(params)
        params = new
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
    np.testing.assert_allclose(optax.global_norm(clipped), 0.1 * 0.7, rtol=1e-6)
    whole = moves(settings(clip_norm=1e4), grads)
    np.testing.assert_allclose(optax.global_norm(whole), 0.3 * 30**0.5, rtol=1e-6)
    off = moves(settings(clip_norm=0.0), grads)
    np.testing.assert_array_equal(off["head"]["bias"], whole["head"]["bias"])


def test_unknown_optimiser_is_an_error_with_the_nearest():
    with pytest.raises(
        ValueError, match="no optimiser 'lin'; did you mean 'lion'"
    ) as e:
        optim.make(settings("lin"), tree(), PATH)
    known = str(e.value).partition("Known: ")[2].rstrip(".").split(", ")
    assert "muon" in known and not [n for n in known if n.startswith(("_", "scale"))]
    # A function of optax that is no optimiser.
    with pytest.raises(ValueError, match="no optimiser 'global_norm'"):
        optim.make(settings("global_norm"), tree(), PATH)


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
