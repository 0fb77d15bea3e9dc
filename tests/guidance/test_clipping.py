"""Clipping and thresholding: the value is in range, the derivative is untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.guidance.clipping import ClipX, DynamicThreshold
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.schedules.flow import Flow
from diffusionlab.types import DataSpec, Prediction, lift

PROCESS = Gaussian(schedule=Flow(), prediction="v")
SPEC = DataSpec(shape=(40,))
BOTH = [ClipX(low=-0.5, high=0.6), DynamicThreshold(quantile=0.9, limit=0.5)]


def predict(z_t, t, cond):
    """A prediction with a derivative that is not constant, beyond every range."""
    alpha, sigma = (lift(q, z_t.ndim) for q in PROCESS.schedule.alpha_sigma(t))
    x = jnp.sinh(z_t) + 0.1 * z_t**2
    return Prediction(x, (z_t - alpha * x) / sigma)


def noisy():
    z_t = jax.random.normal(jax.random.key(0), (4, 40))
    return z_t.at[0].multiply(0.1)  # the first example stays within every range


@pytest.mark.parametrize("transform", BOTH)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_x_and_eps_still_explain_the_noisy_data(transform, t):
    z_t = noisy()
    found = jax.jit(transform(predict, PROCESS, SPEC))(z_t, jnp.float32(t), {})
    np.testing.assert_allclose(PROCESS.mix(*found, t), z_t, rtol=1e-6, atol=1e-6)
    plain = jax.jit(predict)(z_t, jnp.float32(t), {})
    np.testing.assert_array_equal(found.x[0], plain.x[0])
    np.testing.assert_array_equal(found.eps[0], plain.eps[0])
    assert np.abs(plain.x[1:]).max() > 1.0 and np.abs(found.x).max() <= 0.6


@pytest.mark.parametrize("transform", BOTH)
def test_derivative_is_that_of_the_unclipped_prediction(transform):
    z_t, t = noisy(), jnp.full(4, 0.4)
    changed = transform(predict, PROCESS, SPEC)
    direction = jax.random.normal(jax.random.key(1), z_t.shape)
    back = Prediction(direction, 2 * direction)
    for found, expected in zip(
        *[
            (
                jax.jvp(lambda z, f=f: f(z, t, {}), (z_t,), (direction,))[1],
                jax.vjp(lambda z, f=f: f(z, t, {}), z_t)[1](back),
            )
            for f in (changed, predict)
        ],
        strict=True,
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            found,
            expected,
        )


def test_threshold_is_the_quantile_of_each_example():
    z_t, t = noisy(), jnp.float32(0.5)
    x = np.asarray(predict(z_t, t, {}).x, np.float64)
    s = np.maximum(np.quantile(np.abs(x), 0.9, axis=1, keepdims=True), 0.5)
    transform = DynamicThreshold(quantile=0.9, limit=0.5)
    found = transform(predict, PROCESS, SPEC)(z_t, t, {})
    np.testing.assert_allclose(found.x, np.clip(x, -s, s) / s * 0.5, rtol=1e-5)
    # An example does not see the others.
    alone = transform(predict, PROCESS, SPEC)(z_t[1:2], t, {})
    np.testing.assert_allclose(alone.x, found.x[1:2], rtol=1e-6)


def test_few_entries_outside_are_only_clipped():
    z_t = jnp.zeros((1, 40)).at[0, 0].set(2.0).at[0, 1].set(0.3)
    found = DynamicThreshold(quantile=0.9)(predict, PROCESS, SPEC)(z_t, 0.5, {})
    assert float(found.x[0, 0]) == 1.0
    assert float(found.x[0, 1]) == float(predict(z_t, 0.5, {}).x[0, 1])


def test_infinite_x_is_clipped_too():
    infinite = lambda z_t, t, cond: Prediction(jnp.full_like(z_t, jnp.inf), z_t)  # noqa: E731
    assert float(ClipX()(infinite, PROCESS, SPEC)(noisy(), 0.5, {}).x.max()) == 1.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ClipX(low=1.0, high=1.0), "low: must be below high = 1.0"),
        (lambda: DynamicThreshold(quantile=0.0), r"quantile: must be in \(0, 1\]"),
        (lambda: DynamicThreshold(limit=0.0), "limit: must be positive"),
    ],
)
def test_a_range_that_is_none_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
