"""Parts of networks of tokens: turns by position, and scores in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.models import layers, tokens


@pytest.mark.parametrize("length, chunks", [(10, (0, 1, 4)), (8, (4,))])
def test_scores_in_chunks_are_those_of_all_logits(length, chunks):
    """And so are gradients; 10 positions by 4 leave a piece of 2, 8 by 4 none."""
    rng = np.random.default_rng(5)
    h = jnp.asarray(rng.normal(size=(2, length, 6)), jnp.float32)
    params = {"kernel": rng.normal(size=(6, 7)), "bias": rng.normal(size=7)}
    target = jnp.asarray(rng.integers(0, 7, (2, length)))
    weight = jnp.asarray(rng.normal(size=(2, length)), jnp.float32)

    def scores(chunk, params, h):
        head = tokens.Head(7, chunk, "float32")
        found = head.apply({"params": params}, h, target)
        return (weight * found).sum(), found

    def expected(params, h):
        log_probs = jax.nn.log_softmax(h @ params["kernel"] + params["bias"])
        found = jnp.take_along_axis(log_probs, target[..., None], -1)[..., 0]
        return (weight * found).sum(), found

    params = jax.tree.map(jnp.float32, params)
    wanted = jax.jit(jax.grad(expected, (0, 1), has_aux=True))(params, h)
    for chunk in chunks:
        function = functools.partial(scores, chunk)
        found = jax.jit(jax.grad(function, (0, 1), has_aux=True))(params, h)
        # Sums of at most 20 products of order one.
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_logits_are_summed_in_float32_whatever_the_compute_dtype():
    rng = np.random.default_rng(7)
    short = [jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in ((1, 3, 6), (6, 7))]
    h, kernel = (np.asarray(a, np.float64) for a in short)
    params = {"kernel": jnp.float32(kernel), "bias": jnp.zeros(7)}
    found = tokens.Head(7, 0, "bfloat16").apply({"params": params}, short[0])
    # Rounded to bfloat16 they would be 2^-9 of their size off.
    np.testing.assert_allclose(found, h @ kernel, rtol=1e-5, atol=1e-5)


def test_rotation_tells_differences_of_positions():
    rng = np.random.default_rng(3)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 12)), jnp.float32)

    def score(i, j):
        angles = layers.rotary_angles(np.array([i, j]), 12)
        turned_query = layers.rotate(query, angles[:1])
        return float((turned_query * layers.rotate(key, angles[1:])).sum())

    # Angles up to 10 in float32: 1e-6, times twelve products of order one.
    for i, j in (([0], [3]), ([2], [5]), ([7], [10])):
        assert score(i, j) == pytest.approx(score([0], [3]), abs=5e-5)
    assert abs(score([3], [0]) - score([0], [3])) > 0.05
    assert abs(score([0], [4]) - score([0], [3])) > 0.05
    assert score([4], [4]) == pytest.approx(float((query * key).sum()), abs=5e-5)
    # On a grid, by each axis.
    assert score([1, 5, 2], [2, 3, 2]) == pytest.approx(
        score([4, 7, 0], [5, 5, 0]), abs=5e-5
    )
    for other in ([1, 3, 2], [2, 4, 2], [2, 3, 1]):
        assert abs(score([1, 5, 2], other) - score([1, 5, 2], [2, 3, 2])) > 1e-3


def test_rotation_is_by_the_formula():
    angles = layers.rotary_angles(np.array([[0], [3]]), 4)
    np.testing.assert_allclose(angles, [[0, 0], [3, 0.03]], rtol=1e-6)
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    expected = [np.cos(3), -2 * np.sin(0.03), np.sin(3), 2 * np.cos(0.03)]
    turned = layers.rotate(x, angles[1:])
    np.testing.assert_allclose(turned.ravel(), expected, atol=1e-6)


def test_places_run_along_the_axes_that_there_are():
    np.testing.assert_array_equal(tokens.places((4,)), [[0], [1], [2], [3]])
    np.testing.assert_array_equal(
        tokens.places((2, 2, 1)), [[0, 0], [0, 1], [1, 0], [1, 1]]
    )
    assert tokens.places((2, 3, 3)).shape == (18, 3)
    np.testing.assert_array_equal(tokens.places((1,)), [[0]])
