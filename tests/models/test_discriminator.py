"""The head on another network's features: logits, one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.models.discriminator import Discriminator
from diffusionlab.models.network import as_network
from diffusionlab.types import DataSpec

SPEC = DataSpec((8, 8, 1), 5)


def make(dtype="float32", **fields):
    fields = {"features": 6, "width": 16, "num_layers": 2, **fields}
    return as_network(Discriminator(spec=SPEC, dtype=dtype, **fields), SPEC)


def inputs():
    features = jax.random.normal(jax.random.key(1), (4, 6))
    t = jnp.linspace(0.1, 0.9, 4)
    return features, {"t": t, "logsnr": 4 - 8 * t, "label": jnp.arange(4)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_start_at_zero_and_see_features_noise_level_and_class(dtype):
    net = make(dtype)
    start = jax.jit(net.init)(jax.random.key(0))
    apply, (features, cond) = jax.jit(net.apply), inputs()
    found = apply(start, features, cond)
    assert found.shape == (4,) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 0)
    waves = lambda p: jnp.sin(7.0 * jnp.arange(p.size).reshape(p.shape))  # noqa: E731
    moved = jax.tree.map(lambda p: p + 0.3 * waves(p), start)
    found = apply(moved, features, cond)
    one = apply(moved, features[1:2], jax.tree.map(lambda q: q[1:2], cond))
    np.testing.assert_allclose(found[1:2], one, rtol=1e-3)
    for changed in (
        apply(moved, jnp.flip(features, 0), cond),
        apply(moved, features, cond | {"logsnr": jnp.flip(cond["logsnr"])}),
        apply(moved, features, cond | {"label": jnp.flip(cond["label"])}),
    ):
        assert np.abs(changed - found).max() > 1e-3


def test_another_number_of_features_is_named():
    net = make(features=7)
    params = jax.eval_shape(net.init, jax.random.key(0))
    with pytest.raises(ValueError, match="features: is 7, but .* has 6; give"):
        jax.eval_shape(net.apply, params, *inputs())


@pytest.mark.parametrize("name", ["features", "width", "num_layers"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"^{name}"):
        make(**{name: 0})
