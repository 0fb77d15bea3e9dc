import jax
import numpy as np
import pytest

from diffusionlab.features import resize

BILINEAR = [resize.tf1_bilinear, resize.half_pixel_bilinear]


def row(values):
    """`[1, 1, W, 1]`."""
    return np.array(values, np.float32).reshape(1, 1, -1, 1)


@pytest.mark.parametrize(
    ("function", "values", "width", "expected"),
    [
        (resize.tf1_bilinear, [0, 1], 4, [0, 0.5, 1, 1]),
        (resize.tf1_bilinear, [0, 1, 2], 6, [0, 0.5, 1, 1.5, 2, 2]),
        # Every second pixel, whatever lies between: no antialiasing.
        (resize.tf1_bilinear, [3, 9, 5, 9], 2, [3, 5]),
        (resize.half_pixel_bilinear, [0, 1], 4, [0, 0.25, 0.75, 1]),
        (resize.half_pixel_bilinear, [3, 9, 5, 9], 2, [6, 7]),
        (resize.half_pixel_bilinear, [0, 9, 0, 6, 0, 3], 2, [9, 0]),
    ],
)
@pytest.mark.parametrize("axis", [1, 2])
def test_bilinear_by_hand(function, values, width, expected, axis):
    x = row(values) if axis == 2 else row(values).swapaxes(1, 2)
    size = (1, width) if axis == 2 else (width, 1)
    found = np.asarray(function(x, *size))
    assert found.shape == (1, *size, 1)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("function", BILINEAR)
def test_bilinear_is_jitted_over_uint8_images_and_videos(function):
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4, 3), dtype=np.uint8)
    found = jax.jit(function, static_argnums=(1, 2))(x, 7, 9)
    assert found.shape == (2, 3, 7, 9, 3) and found.dtype == np.float32
    for i in range(2):  # a few roundings of values up to 255
        np.testing.assert_allclose(function(x[i], 7, 9), found[i], atol=1e-4)
    np.testing.assert_array_equal(function(x, 5, 4), np.float32(x))


@pytest.mark.parametrize("size", [1, 7, 32, 299, 512])
def test_bilinear_stays_within_its_pixels(size):
    """Rows of the matrices are weights: none negative, together 1."""
    for matrix in (resize._tf1(size, 299), resize._half_pixel(size, 299)):
        assert matrix.shape == (299, size) and matrix.min() >= 0
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
        assert ((matrix > 0).sum(axis=1) <= 2).all()


def test_bilinear_has_the_values_of_torch():
    """From torch-fidelity's resize like TensorFlow 1's, and torch's interpolate."""
    x = (np.arange(30).reshape(1, 5, 6, 1) * 37 % 101).astype(np.uint8)
    tf1 = [0.0, 88.28571, 75.57143, 57.14286, 26.0]
    half = [18.5, 53.42857, 40.71429, 72.78571, 44.5]
    found = np.asarray(resize.tf1_bilinear(x, 7, 3))[0, ..., 0]
    np.testing.assert_allclose(found.ravel()[[0, 4, 8, 12, 20]], tf1, rtol=1e-5)
    found = np.asarray(resize.half_pixel_bilinear(x, 7, 3))[0, ..., 0]
    np.testing.assert_allclose(found.ravel()[[0, 4, 8, 12, 20]], half, rtol=1e-5)


def test_bicubic_has_the_values_of_clean_fid():
    """clean-fid 0.1.35, up and down; its kernel overshoots, and is clipped."""
    x = (np.arange(60).reshape(1, 5, 6, 2) * 53 % 256).astype(np.uint8)
    up = resize.pil_bicubic(x, 8, 9)
    assert up.shape == (1, 8, 9, 2) and up.dtype == np.float32
    down = resize.pil_bicubic(x, 3, 2)
    expected = [72.87007, 103.2096, 113.1253, 37.25145]
    np.testing.assert_allclose(up[0, 3, :4, 1], expected, rtol=1e-6)
    expected = [125.4761, 108.2777, 161.8313, 98.55006, 153.6607, 91.17004]
    np.testing.assert_allclose(down[0, :, :, 0].ravel(), expected, rtol=1e-6)
    assert up.min() == 0 and up.max() == 255


def test_bicubic_of_a_constant_is_the_constant():
    x = np.full((2, 40, 9, 1), 200, np.uint8)
    np.testing.assert_allclose(resize.pil_bicubic(x, 13, 17), 200, rtol=1e-6)
