"""Two steps as one, and aDDIM as DDIM with another x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from diffusionlab.distillation import base, fine_steps
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import grids
from diffusionlab.samplers.addim import Addim
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import Prediction

PROCESS = tables.PROCESS


def rows(number, size=6, seed=0):
    return np.random.default_rng(seed).normal(size=(number, size)).astype(np.float32)


def all_fine(segments, each):
    segment, step = np.divmod(np.arange(segments * each), each)
    return fine_steps.fine_steps(
        jnp.int32(segment), jnp.int32(step + 1), segments, each
    )


def step(x, z, t, s):
    """DDIM from alpha and sigma alone, in float64."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = tables.scales(t), tables.scales(s)
    ratio = sigma_s / sigma_t
    return alpha_s * x + ratio * (z - alpha_t * x)


def inverse(z_s, z, t, s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = tables.scales(t), tables.scales(s)
    ratio = sigma_s / sigma_t
    return (z_s - ratio * z) / (alpha_s - alpha_t * ratio)


@pytest.mark.parametrize("each", [1, 3, 160])
def test_fine_steps_fill_their_segments(each):
    fine = all_fine(4, each)
    t = np.arange(1, 4 * each + 1) / (4 * each)
    np.testing.assert_allclose(fine.t, t, rtol=1e-7)
    np.testing.assert_allclose(fine.s, t - 1 / (4 * each), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(fine.b, np.repeat(np.arange(4) / 4, each))
    np.testing.assert_array_equal(fine.last, np.arange(4 * each) % each == 0)
    # The quotients of equal numbers are the same float32.
    np.testing.assert_array_equal(fine.s[fine.last], fine.b[fine.last])
    np.testing.assert_array_equal(fine.other, np.where(fine.last, fine.t, fine.s))
    assert np.all(fine.other > 0)


def test_a_draw_is_uniform_over_the_fine_steps():
    keys = list(jax.random.split(jax.random.key(0)))
    fine = jax.jit(lambda each: fine_steps.draw(keys, 12_000, 4, each))(3)
    found = np.bincount(np.round(np.asarray(fine.t) * 12).astype(int), minlength=13)
    # 1000 expected of each, with a standard deviation of 30.
    assert found[0] == 0 and np.all(np.abs(found[1:] - 1000) < 5 * 30)


@pytest.mark.parametrize("each", [2, 160])
def test_two_steps_as_one_are_inverse_ddim_of_the_two(each):
    fine = all_fine(8, each)
    z, first, second = (rows(8 * each, seed=seed) for seed in range(3))
    found = fine_steps.joined(PROCESS, first, second, fine)
    number = 8 * each
    i = np.arange(1, number + 1)[:, None]
    t, s, b = i / number, (i - 1) / number, (i - 1) // each / 8
    z_s = step(np.float64(first), z, t, s)
    z_b = np.where(s == b, z_s, step(np.float64(second), z_s, np.maximum(s, 1e-9), b))
    # The weights are ratios of differences of logsnr: rounding t by 6e-8 changes a
    # difference over 1 / number by 1e-7 number.
    np.testing.assert_allclose(found, inverse(z_b, z, t, b), atol=5e-7 * number + 1e-6)
    last = np.asarray(fine.last)
    np.testing.assert_array_equal(found[last], first[last])
    # A segment that starts at clean data ends where its second step ends.
    clean = ~last & (np.asarray(fine.b) == 0)
    np.testing.assert_array_equal(found[clean], second[clean])


def test_what_is_followed_is_asked_at_z_s():
    fine = all_fine(2, 3)
    z, first = rows(6), rows(6, seed=1)
    asked = {}

    def answer(z_s, s):
        asked.update(z=z_s, t=s)
        return 0.5 * z_s

    found = fine_steps.followed(PROCESS, first, z, fine, answer)
    z_s = base.ddim(PROCESS, first, z, fine.t, fine.s)
    last = np.asarray(fine.last)[:, None]
    np.testing.assert_array_equal(asked["t"], fine.other)
    np.testing.assert_array_equal(asked["z"], np.where(last, z, z_s))
    expected = fine_steps.joined(PROCESS, first, 0.5 * asked["z"], fine)
    np.testing.assert_array_equal(found, expected)


def orthogonal(number=4, size=6):
    """x and eps of which every example's product is 0."""
    x, eps = rows(number, size), rows(number, size, seed=1)
    x -= (x * eps).sum(1, keepdims=True) / (eps**2).sum(1, keepdims=True) * eps
    return x, eps


def taken(prediction, xvar, t, s, process=PROCESS):
    """z_s of aDDIM from the z_t of this prediction."""
    number = prediction.x.shape[0]
    t, s, xvar = (jnp.full(number, q, jnp.float32) for q in (t, s, xvar))
    x = fine_steps.addim_x(process, prediction, xvar, t, s)
    return base.ddim(process, x, process.mix(*prediction, t), t, s)


@pytest.mark.parametrize("s", [0.25, 0.49, 0.0])
def test_addim_adds_the_norm_that_ddim_loses(s):
    x, eps = orthogonal()
    added = sum(
        sign * np.sum(np.float64(taken(Prediction(x, eps), xvar, 0.5, s)) ** 2, axis=1)
        for sign, xvar in ((1, 0.3), (-1, 0.0))
    )
    (alpha_t, sigma_t), (alpha_s, sigma_s) = tables.scales(0.5), tables.scales(s)
    kappa = alpha_s - alpha_t * sigma_s / sigma_t
    if s == 0.25:
        assert kappa == pytest.approx(0.541196, abs=1e-6)
        assert kappa**2 == pytest.approx(0.292893, abs=1e-6)
    # Norms of about 6 in float32.
    np.testing.assert_allclose(added, 6 * kappa**2 * 0.3, atol=2e-5)


def test_addim_from_pure_noise_has_the_variance_of_every_time():
    c, eps = 0.5, rows(4)
    start = Prediction(np.zeros_like(eps), eps)
    for s in (0.0, 0.25, 0.75, 0.99):
        norm = np.mean(np.square(taken(start, c**2, 1.0, s)), axis=1)
        share = np.mean(eps**2, axis=1)
        alpha, sigma = tables.scales(s)
        expected = (alpha * c) ** 2 + sigma**2 * share
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    np.testing.assert_array_equal(taken(start, 0.0, 1.0, 0.0), 0 * eps)


@pytest.mark.parametrize("s", [0.3, 0.0])
def test_addim_is_the_step_of_the_sampler(s):
    process = Gaussian(schedule=Cosine(), prediction="v")
    prediction = Prediction(
        rows(4), rows(4, seed=1) * np.float32([[1], [2], [3], [0.1]])
    )
    sampler = Addim(num_steps=1, posterior_variance=0.2)
    state = sampler.init(prediction.x, 0.7)
    state = sampler.step(
        process, lambda z, t: prediction, state, jnp.float32(0.7), jnp.float32(s), None
    )
    found = taken(prediction, 0.2, 0.7, s, process)
    expected = state.x if s == 0 else state.z
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_addim_without_noise_or_variance_is_finite():
    x, eps = rows(4), rows(4, seed=1)
    for e, xvar in ((0 * eps, 0.3), (0 * eps, 0.0), (eps, 0.0)):
        for s in (0.0, 0.5):
            assert np.all(np.isfinite(taken(Prediction(x, e), xvar, 0.7, s)))


def test_the_weights_turn_errors_of_x_into_those_of_others():
    t = jnp.linspace(0.05, 0.95, 7)
    alpha, sigma = PROCESS.schedule.alpha_sigma(t)
    weight = lambda name: fine_steps.weight(name, PROCESS.schedule, t)  # noqa: E731
    # v - v_hat = (x_hat - x) / sigma and eps - eps_hat = (x_hat - x) alpha / sigma.
    np.testing.assert_allclose(weight("snr+1"), 1 / sigma**2, rtol=1e-5)
    np.testing.assert_allclose(weight("sqrt(snr+1)"), 1 / sigma, rtol=1e-5)
    largest = np.maximum(1, (alpha / sigma) ** 2)
    np.testing.assert_allclose(weight("truncated_snr"), largest, rtol=1e-5)


def test_only_ddim_in_equal_steps_samples_such_a_student():
    class Student:
        num_steps = 4

    fine_steps.check_sampler(Student, Ddim(num_steps=4))
    fine_steps.check_sampler(Student, Ddim(num_steps=4, grid=grids.Uniform()))
    with pytest.raises(ValueError, match="num_steps: is 8"):
        fine_steps.check_sampler(Student, Ddim(num_steps=8))
    for sampler in (
        Ddim(num_steps=4, eta=1.0),
        Ddim(num_steps=4, grid=grids.Logsnr()),
        Addim(num_steps=4),
        Ancestral(num_steps=4),
    ):
        with pytest.raises(ValueError, match="name: .*'ddim' with eta 0"):
            fine_steps.check_sampler(Student, sampler)
