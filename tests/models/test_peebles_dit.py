"""Published DiT weights: the same answers as a forward pass written apart from it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.models import network
from diffusionlab.models.peebles_dit import PeeblesDiT, positions
from diffusionlab.types import DataSpec

sys.path.append(str(Path(__file__).parent))
import published_dit


@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("classes", [published_dit.CLASSES, 0])
def test_answers_are_those_of_the_published_network(variance, classes):
    arrays = published_dit.state(variance=variance, classes=classes)
    net, params = published_dit.loaded(arrays, classes=classes)
    z = np.random.default_rng(1).normal(size=(3, *published_dit.SHAPE))
    # The last class is the null one.
    step, label = np.array([0, 371, 999]), np.array([2, 0, classes])
    cond = {"t": jnp.float32(step / 999), "logsnr": jnp.zeros(3)}
    found = jax.jit(net.apply)(params, jnp.float32(z), {**cond, "label": label})
    for i in range(3):
        image = z[i].transpose(2, 0, 1)
        expected = published_dit.forward(arrays, image, step[i], label[i])
        # Steps of a thousand are told with float32's error of them, 6e-5.
        expected = expected.transpose(1, 2, 0)
        np.testing.assert_allclose(found[i], expected, atol=3e-4, rtol=1e-4)


def test_positions_tell_the_column_first():
    expected = published_dit.position(16, 3, 4)
    np.testing.assert_allclose(positions(16, 3, 4), expected, atol=1e-6)
    # By hand: token (1, 2), frequencies 1 and 1/100 of the column, then of the row.
    found = positions(8, 3, 4)[1 * 4 + 2]
    by_hand = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
    by_hand += [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(found, by_hand, atol=1e-6)


def test_the_defaults_are_those_of_dit_xl():
    """675 million parameters, of which the published count has the variance, too."""
    spec = DataSpec((32, 32, 4), 1000)
    net = network.as_network(PeeblesDiT(spec=spec, dtype="float32"), spec)
    shapes = jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0)))
    count = sum(int(np.prod(leaf.shape)) for leaf in shapes)
    # Not ours: 16 numbers a token for the variance, and 256 fixed positions.
    published = count + 16 * 1153 + 256 * 1152
    assert published == 675_129_632


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(width=30, num_heads=5), "width: must be a multiple of 4, got 30"),
        (dict(patch_size=4), "patch_size: 4 does not divide images of 6 by 8"),
        (dict(num_heads=5), "num_heads: 5 does not divide the width 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    fields = {**published_dit.SIZES, **sizes}
    with pytest.raises(ValueError, match=f"^{message}"):
        PeeblesDiT(spec=DataSpec(published_dit.SHAPE), dtype="float32", **fields)
