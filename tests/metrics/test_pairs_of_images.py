import numpy as np
import pytest

from diffusionlab.metrics import psnr, ssim
from diffusionlab.types import DataSpec


def images(seed=0, shape=(3, 16, 14, 2)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_psnr_of_a_constant_error():
    zero = np.zeros((2, 4, 4, 3))
    assert psnr.psnr(zero, zero + 0.1, data_range=1) == pytest.approx([20, 20])
    assert psnr.psnr(zero, zero + 0.2) == pytest.approx([20, 20])


def test_psnr_is_per_image():
    zero, other = np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4, 1))
    other[1] += 0.02
    other[0] += 0.2
    assert psnr.psnr(zero, other) == pytest.approx([20, 40])


def test_psnr_of_equal_images_is_capped():
    x = images()
    assert np.all(psnr.psnr(x, x) == np.inf)
    metric = psnr.Psnr(cap=90.0)
    metric.check(DataSpec((4,)))
    assert metric.prepare(None)(x, x).tolist() == [90, 90, 90]
    assert metric.prepare(None)(x, -x).dtype == np.float64
    with pytest.raises(ValueError, match="cap: must be above 0"):
        psnr.Psnr(cap=0.0)
    with pytest.raises(ValueError, match="psnr: the shapes"):
        psnr.psnr(x, x[:1])


def by_definition(x, y):
    """Equation 1 with an explicit 11 x 11 window at every place, in float64."""
    at = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weight = np.outer(at, at) / at.sum() ** 2
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            m_a, m_b = np.sum(weight * a), np.sum(weight * b)
            v_a = np.sum(weight * (a - m_a) ** 2)
            v_b = np.sum(weight * (b - m_b) ** 2)
            v_ab = np.sum(weight * (a - m_a) * (b - m_b))
            top = (2 * m_a * m_b + 0.02**2) * (2 * v_ab + 0.06**2)
            bottom = (m_a**2 + m_b**2 + 0.02**2) * (v_a + v_b + 0.06**2)
            found.append(top / bottom)
    return np.mean(found)


def test_ssim_is_its_definition():
    x, y = images(), 0.5 * images() + 0.5 * images(1)
    exact = [
        np.mean([by_definition(*(q.astype(float)[i, :, :, c] for q in (x, y)))
                 for c in range(2)])
        for i in range(3)
    ]  # fmt: skip
    assert ssim.ssim(x, y) == pytest.approx(exact, abs=1e-12)


def test_ssim_of_equal_and_of_constant_images():
    x = images()
    assert ssim.ssim(x, x) == pytest.approx(np.ones(3), abs=1e-14)
    assert np.array_equal(ssim.ssim(x, -x), ssim.ssim(-x, x))
    flat = np.full((1, 11, 11, 1), 0.5)
    # Without variance the second factor is 1.
    exact = (2 * 0.5 * 0.1 + 0.02**2) / (0.5**2 + 0.1**2 + 0.02**2)
    assert ssim.ssim(flat, 0 * flat + 0.1) == pytest.approx([exact], abs=1e-12)


def test_ssim_takes_images_of_at_least_a_window():
    metric = ssim.Ssim()
    metric.check(DataSpec((11, 11, 3)))
    assert metric.prepare(None)(images(), images(1)).shape == (3,)
    with pytest.raises(ValueError, match="'ssim' has a window of 11 x 11 .* 8 x 16"):
        metric.check(DataSpec((8, 16, 1)))
    with pytest.raises(ValueError, match="8 x 8"):
        ssim.ssim(images(shape=(1, 8, 8, 1)), images(shape=(1, 8, 8, 1)))
    with pytest.raises(ValueError, match="takes images"):
        metric.check(DataSpec((16, 11, 11, 3)))
    with pytest.raises(ValueError, match="two arrays"):
        ssim.ssim(images(), images()[:1])
