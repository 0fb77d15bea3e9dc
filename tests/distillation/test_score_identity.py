"""Score identity distillation: the identity, its gradient, and its fixed points."""

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from diffusionlab.distillation import base, generator
from diffusionlab.distillation.score_identity import (
    ScoreIdentity,
    identity_loss,
    karras_times,
)
from diffusionlab.schedules.cosine import Cosine

C = scores.C
NODES, WEIGHTS = scores.normal_grid()
ROOT = 0.5**0.5


def value(theta, fake, alpha):
    """E of the loss without its denominator, for alpha² = sigma² = 1/2 and c = 1."""
    x = theta * NODES[:, :1]
    z_t = ROOT * (x + NODES[:, 1:])
    taught, learned = (ROOT * c**2 / (0.5 * c**2 + 0.5) * z_t for c in (1.0, fake))
    return (WEIGHTS * identity_loss(x, taught, learned, alpha)).sum()


def test_identity_at_the_exact_score_network():
    # a = 0 leaves E[u (y - x)]; the difference of a = 0 and a = 1 is E[u²].
    both = value(0.5, 0.5, 0.0), value(0.5, 0.5, 0.0) - value(0.5, 0.5, 1.0)
    np.testing.assert_allclose(both, [0.1125, 0.1125], rtol=1e-5)
    found = value(0.5, 0.5, 1.2)
    np.testing.assert_allclose(found, (1 - 1.2) * 0.1125, rtol=1e-4)


@pytest.mark.parametrize(
    ("theta", "expected"), [(0.5, -0.258), (2.0, 0.168), (1.0, 0.0)]
)
def test_gradient_with_the_score_network_held_fixed(theta, expected):
    found = jax.grad(value)(theta, theta, 1.2)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    v = 0.5 * theta**2 + 0.5
    f_teacher, f_aux = ROOT * 1.0, ROOT * theta**2 / v
    d = f_teacher - f_aux
    formula = d * ((f_teacher - 1.2 * d) * theta - 2 * ROOT * theta)
    np.testing.assert_allclose(found, formula, atol=1e-5)


def test_gradient_flows_through_x_and_through_z_t_into_both_networks():
    objective, theta, size = scores.make(ScoreIdentity), 0.5, 32
    found, key = scores.params(theta), jax.random.key(4)
    given = scores.inputs(found, key, size)
    keys = base.split(key, 4)
    shape = given.batch["x"].shape
    start = generator.start(objective, found["student"], keys[0], shape, {})
    schedule = scores.PROCESS.schedule
    t = karras_times(keys[2], size, schedule, objective.max_u)
    _, eps = scores.PROCESS.corrupt(keys[3], jnp.zeros(shape), t)
    alpha, sigma = (q[:, None] for q in schedule.alpha_sigma(t))
    n = start.z_t
    x, z_t = theta * n, alpha * theta * n + sigma * eps
    f_teacher, f_aux = (alpha * c**2 / (alpha**2 * c**2 + sigma**2) for c in (C, theta))
    d = f_teacher - f_aux
    # d/dtheta of d z (f z - x - a d z), with dz = alpha n and dx = n.
    slope = d * alpha * n * (f_teacher * z_t - x - 1.2 * d * z_t)
    slope += d * z_t * (f_teacher * alpha * n - n - 1.2 * d * alpha * n)
    size_of = jnp.abs(x - f_teacher * z_t).mean(axis=1)
    expected = (slope.mean(axis=1) / size_of).mean()
    # The start is near enough to z = eps that x = theta eps.
    np.testing.assert_allclose(
        scores.slope(objective, theta, key, size), expected, rtol=1e-3
    )


def test_matched_student_stays_and_others_come_to_it_from_both_sides():
    objective = scores.make(ScoreIdentity)
    assert scores.slope(objective, C) == 0
    found = scores.flow(objective, [0.3 * C, 3 * C, -0.3 * C], rate=0.3)
    np.testing.assert_allclose(found, [C, C, -C], atol=2e-3)


def test_gradients_stop_at_all_networks_but_the_student():
    objective, found = scores.make(ScoreIdentity), scores.params(0.5)

    def value(own, rest):
        return objective.loss(own, scores.inputs(rest, size=16))[0]

    own = {"student": found["student"]}
    moved, frozen = jax.grad(value, (0, 1))(own, found)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert np.any(moved["student"]["a"])
    assert objective.phases["student"].trains == ("student",)
    assert objective.phases["aux"].trains == ("aux",)


def test_times_are_those_of_the_grid_of_edm_without_the_noisiest():
    schedule = Cosine(logsnr_min=-15.0, logsnr_max=15.0)
    t = jnp.sort(karras_times(jax.random.key(0), 1000, schedule, 0.8))
    level = jnp.exp(-0.5 * schedule.logsnr(t))
    # Stratified: the quantiles u of 1000 are within 1e-3 of i / 1000.
    u = 0.8 * (jnp.arange(1000) + 0.5) / 1000
    root = 0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))
    np.testing.assert_allclose(level, root**7, rtol=0.02)
    np.testing.assert_allclose(level[-1], 24.4, rtol=0.02)
    narrow = Cosine(logsnr_min=-5.0, logsnr_max=5.0)
    ends = karras_times(jax.random.key(0), 1000, narrow, 1.0)
    assert ends.min() >= 0 and ends.max() <= 1


def test_the_student_starts_from_the_noise_of_the_paper():
    objective = scores.make(ScoreIdentity, first_logsnr=ScoreIdentity.first_logsnr)
    t = generator.times(objective)[0]
    alpha, sigma = scores.PROCESS.schedule.alpha_sigma(t)
    np.testing.assert_allclose(sigma / alpha, 2.5, rtol=1e-4)


@pytest.mark.parametrize("phase", ["aux", "student"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_cost_of_a_step(phase, scale):
    if phase == "aux" and scale != 1.0:
        pytest.skip("aux is not guided")
    found, said = scores.evaluations(ScoreIdentity, phase, guidance_scale=scale)
    np.testing.assert_allclose(found, said, rtol=0.1)


@pytest.mark.parametrize("max_u", [0.0, 1.5])
def test_max_u_is_a_share(max_u):
    with pytest.raises(ValueError, match="^max_u"):
        scores.make(ScoreIdentity, max_u=max_u)
