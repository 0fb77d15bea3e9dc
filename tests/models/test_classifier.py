"""The classifier: logits for images and vectors, one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.models.classifier import Classifier
from diffusionlab.models.network import as_network
from diffusionlab.types import DataSpec

IMAGE, VECTOR = DataSpec((8, 8, 1), 5), DataSpec((6,), 5)
SIZES = dict(dtype="float32", width=16, num_layers=1, num_heads=2)


def make(spec, patch_size):
    net = as_network(Classifier(spec=spec, patch_size=patch_size, **SIZES), spec)
    waves = lambda p: jnp.sin(7.0 * jnp.arange(p.size).reshape(p.shape))  # noqa: E731
    start = jax.jit(net.init)(jax.random.key(0))
    moved = jax.tree.map(lambda p: p + 0.3 * waves(p), start)
    return jax.jit(net.apply), start, moved


def inputs(spec):
    z = jax.random.normal(jax.random.key(1), (4, *spec.shape))
    t = jnp.linspace(0.1, 0.9, 4)
    return z, {"t": t, "logsnr": 4 - 8 * t, "label": jnp.arange(4)}


def test_logits_start_equal_and_see_data_and_noise_level_alone():
    apply, start, moved = make(IMAGE, 4)
    z, cond = inputs(IMAGE)
    found = apply(start, z, cond)
    assert found.shape == (4, 5) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 0)
    found = apply(moved, z, cond)
    turned = apply(moved, z, cond | {"label": jnp.flip(cond["label"])})
    np.testing.assert_array_equal(found, turned)
    for change in (
        apply(moved, z, cond | {"logsnr": jnp.flip(cond["logsnr"])}),
        apply(moved, jnp.flip(z, 0), cond),
    ):
        assert np.abs(change - found).max(1).min() > 1e-3
    one = {k: v[:1] for k, v in cond.items()}
    alone = apply(moved, jnp.repeat(z[:1], 4, 0), cond | {
        k: jnp.repeat(v, 4) for k, v in one.items()
    })  # fmt: skip
    np.testing.assert_allclose(alone[0], found[0], rtol=1e-4, atol=1e-5)


def test_a_vector_is_one_token():
    net = as_network(Classifier(spec=VECTOR, **SIZES), VECTOR)
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert params["position"].shape == (1, 16)
    assert jax.eval_shape(net.apply, params, *inputs(VECTOR)).shape == (4, 5)


@pytest.mark.parametrize(
    ("spec", "patch_size", "said"),
    [
        (IMAGE, 3, "patch_size: 3 does not divide"),
        (VECTOR, 2, "patch_size: 2 does not divide"),
        (IMAGE._replace(num_classes=0), 4, "needs data with classes"),
        (DataSpec((2, 4, 4, 1), 5), 2, "takes no data of shape"),
    ],
)
def test_data_that_do_not_fit_are_refused(spec, patch_size, said):
    with pytest.raises(ValueError, match=said):
        Classifier(spec=spec, patch_size=patch_size, **SIZES)
