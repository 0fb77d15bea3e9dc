"""What the methods share: DDIM and its inverse, the teacher's answers, checks."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from diffusionlab.distillation import base
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Prediction, Teacher

PROCESSES = {
    "whole": tables.PROCESS,
    "truncated": Gaussian(schedule=Cosine(), prediction="v"),
}


def inverse_ddim(process, z_s, z_t, t, s):
    """The x that DDIM takes from z_t to z_s (Heek et al. 2024, section 3), s < t."""
    ratio, kappa = (q[:, None] for q in base.coefficients(process, t, s))
    return (z_s - ratio * z_t) / kappa


def normal(number, seed=0):
    shape = (number, 5)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_inverse_ddim_is_the_inverse_of_ddim(process):
    t = np.random.default_rng(1).uniform(0.02, 1.0, 64).astype(np.float32)
    s = t * np.random.default_rng(2).uniform(0.0, 0.95, 64).astype(np.float32)
    s[::8], t[1] = 0.0, 1.0
    x, z = normal(64), normal(64, 1)

    @jax.jit
    def there_and_back(x, z):
        z_s = base.ddim(process, x, z, t, s)
        return z_s, inverse_ddim(process, z_s, z, t, s)

    z_s, found = there_and_back(x, z)
    # Steps shorter than a twentieth of t would amplify the rounding of z_s more.
    np.testing.assert_allclose(found, x, atol=1e-5)
    np.testing.assert_array_equal(z_s[::8], x[::8])
    alpha_t, sigma_t, alpha_s, sigma_s = (
        np.float64(q)[:, None]
        for time in (t, s)
        for q in process.schedule.alpha_sigma(time)
    )
    direct = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    np.testing.assert_allclose(z_s[1:8], direct[1:8], atol=2e-6)


def test_a_step_of_no_length_stays():
    t, z = jnp.float32([0.1, 0.5, 1.0]), normal(3)
    np.testing.assert_array_equal(base.ddim(tables.PROCESS, normal(3, 1), z, t, t), z)


def test_ddim_loses_the_variance_of_x_given_z_t():
    c, t = 0.7, np.array([0.3, 0.5, 0.9, 1.0])
    s = np.array([0.1, 0.25, 0.0, 0.5])
    _, kappa = base.coefficients(tables.PROCESS, jnp.float32(t), jnp.float32(s))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = tables.scales(t), tables.scales(s)
    v_t, v_s = tables.variance(t, c), tables.variance(s, c)
    factor = (alpha_s * alpha_t * c**2 + sigma_s * sigma_t) / v_t
    lost = v_s - factor**2 * v_t
    np.testing.assert_allclose(
        np.float64(kappa) ** 2 * c**2 * sigma_t**2 / v_t, lost, rtol=1e-5
    )
    assert np.all(lost > 0)


def test_the_teacher_is_guided_with_its_null_class():
    def predict(params, z, t, cond):
        value = (10.0 * cond["label"] + params["shift"])[:, None] * jnp.ones_like(z)
        return Prediction(value, -value)

    objective = types.SimpleNamespace(
        teacher=Teacher(predict, has_null_label=True),
        process=tables.PROCESS,
        spec=DataSpec((5,), 2),
        guidance_scale=3.0,
    )
    base.check_guidance(objective)
    cond = base.labels(objective, {"x": 0, "label": jnp.int32([0, 1])})
    params, z, t = {"shift": 1.0}, normal(2), jnp.float32([0.5, 0.5])
    guided = base.teach(objective, params, z, t, cond)
    # Of labels 0, 1 and null = 2: 21 + 3 (1 - 21) and 21 + 3 (11 - 21).
    np.testing.assert_allclose(guided.x[:, 0], [-39.0, -9.0], rtol=1e-6)
    np.testing.assert_allclose(guided.eps, -guided.x)
    plain = base.teach(objective, params, z, t, cond, guidance_scale=1.0)
    np.testing.assert_allclose(plain.x[:, 0], [1.0, 11.0])
    objective.spec = DataSpec((5,))
    assert base.labels(objective, {"x": 0, "label": 0}) == {}


def test_sums_and_counts():
    x = np.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_allclose(base.mean(x), [2.5, 8.5])
    np.testing.assert_allclose(base.total(x), [15, 51])
    assert tuple(map(float, base.metric(jnp.float32([1, 2, 4])))) == (7.0, 3.0)
    t = jnp.float32([0.5, 0.5, 1.0])
    total, count = base.by_logsnr(jnp.float32([1, 2, 4]), PROCESSES["truncated"], t)
    # logsnr is 0 at t = 0.5, the sixth bin of ten, and -15 at t = 1, the first.
    np.testing.assert_array_equal(total, [4, 0, 0, 0, 0, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(count, [1, 0, 0, 0, 0, 2, 0, 0, 0, 0])


def test_the_uses_of_a_key_differ():
    keys = base.split(jax.random.key(0), 3)
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3
    assert [base.turns(step, 2) for step in range(4)] == [
        *("aux", "aux", "student", "aux")
    ]


def test_what_is_missing_or_too_small_is_refused():
    with pytest.raises(ValueError, match="config.teacher: missing"):
        base.require_teacher(None)
    unlabelled = Teacher(None, has_null_label=False)
    base.require_teacher(unlabelled)
    objective = types.SimpleNamespace(
        teacher=unlabelled, guidance_scale=2.0, num_steps=4, width=0
    )
    with pytest.raises(ValueError, match="guidance_scale: 2.0 needs a teacher that"):
        base.check_guidance(objective)
    with pytest.raises(ValueError, match="width: must be at least 1, got 0"):
        base.check_at_least(objective, 1, "num_steps", "width")
    base.check_num_steps(objective, Ddim(num_steps=4))
    with pytest.raises(ValueError, match="num_steps: is 8, but"):
        base.check_num_steps(objective, Ddim(num_steps=8))
