"""EM distillation where all is gaussian: teacher N(0, c²), student x = theta z.

Chains are then linear in independent unit normals. A batch that has each of them as a
unit impulse in an example of its own gives every expectation exactly, as a sum.
"""

import functools

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest
import toys
from scipy import linalg

from diffusionlab.distillation import em_distillation, generator
from diffusionlab.distillation.em_distillation import CANCELLATIONS, EmDistillation

GAMMA = 0.16
HALF = 0.5**0.5  # alpha and sigma at t = 1/2
T = 0.5
make = functools.partial(scores.make, EmDistillation)


def score(theta, c, size):
    """z_t -> sigma D at t = 1/2, as the objective computes it."""
    t = jnp.full(size, T)
    exact = lambda z_t, std: toys.exact(z_t, t, std)  # noqa: E731
    process = toys.PROCESS
    return lambda z_t: generator.score_gap(process, exact(z_t, c), exact(z_t, theta), t)


def impulses(theta, num_steps, gamma_eps, gamma_z, c=1.0, pull=None):
    """The chain for first z, first eps, and every n and m of (2) as an impulse each."""
    size = 2 + 2 * num_steps
    unit = jnp.eye(size)[..., None]
    noise, z_noise = unit[2 : 2 + num_steps], unit[2 + num_steps :]
    return em_distillation.langevin(
        lambda z: theta * z,
        pull or score(theta, c, size),
        unit[0],
        unit[1],
        lambda index: (noise[index], z_noise[index]),
        alpha=jnp.full(size, HALF),
        sigma=jnp.full(size, HALF),
        gamma_eps=gamma_eps,
        gamma_z=gamma_z,
        num_steps=num_steps,
    )


def expected(a, b):
    return float(np.sum(np.float64(a) * np.float64(b)))


def one_step(theta, gamma):
    """(M, S) of state -> M state + S noise, for the state (eps, z), float64."""
    chain = impulses(theta, 1, gamma, gamma)
    rows = np.float64(np.stack([chain.eps[:, 0], chain.z[:, 0]]))
    return rows[:, [1, 0]], rows[:, 2:]


def moments(covariance, theta):
    """E z_t², E z_t z, E z², E eps², E eps z of a covariance of (eps, z)."""
    read = np.array([[HALF, HALF * theta], [0, 1]])
    both = read @ covariance @ read.T
    (eps, cross), (_, z) = covariance
    return both[0, 0], both[0, 1], z, eps, cross


def exact_covariance(theta):
    """Of rho, equation 1: its precision is what pulls the chain, (I - M) / gamma."""
    step, _ = one_step(theta, 0.5)
    return np.linalg.inv((np.eye(2) - step) / 0.5)


def test_the_exact_e_step_has_the_moments_of_rho():
    found = moments(exact_covariance(0.5), 0.5)
    np.testing.assert_allclose(found, [1, 0.565685, 1.12, 1.48, 0.24], atol=5e-6)


def test_regression_on_the_exact_e_step_climbs_to_the_teacher():
    theta, path = 0.5, []
    for _ in range(5):
        _, cross, z, _, _ = moments(exact_covariance(theta), theta)
        theta = cross / (HALF * z)
        path.append(theta)
    published = [5 / 7, 0.8525346, 0.9257631, 0.9628243, 0.9814053]
    np.testing.assert_allclose(path, published, rtol=5e-6)
    fixed = moments(exact_covariance(1.0), 1.0)
    assert fixed[1] / (HALF * fixed[2]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("gamma", "known"),
    [(0.01, (1.4850, 1.1250, 0.2400, 1.0031)), (0.001, (1.4805, 1.1205, 0.24, 1.0003))],
)
def test_a_long_chain_has_the_stationary_moments_of_its_step_size(gamma, known):
    step, noise = one_step(0.5, gamma)
    covariance = linalg.solve_discrete_lyapunov(step, noise @ noise.T)
    square, _, z, eps, cross = moments(covariance, 0.5)
    # M is rounded at 6e-8, which the sum over 1 / gamma steps multiplies.
    np.testing.assert_allclose((eps, z, cross, square), known, atol=1.5e-4)


def test_a_step_follows_the_gradients_of_log_rho():
    theta, c = 0.7, 1.3
    z, eps = jax.random.normal(jax.random.key(0), (2, 16, 1))

    def log_rho(eps, z):
        z_t = HALF * (theta * z + eps)
        q, p = (0.5 * (std**2 + 1) for std in (c, theta))
        return jnp.sum(z_t**2 / p - z_t**2 / q - eps**2 - z**2) / 2

    still = lambda index: (jnp.zeros_like(z), jnp.zeros_like(z))  # noqa: E731
    chain = em_distillation.langevin(
        lambda z: theta * z,
        score(theta, c, 16),
        z,
        eps,
        still,
        alpha=jnp.full(16, HALF),
        sigma=jnp.full(16, HALF),
        gamma_eps=0.5,
        gamma_z=0.25,
        num_steps=1,
    )
    to_eps, to_z = jax.grad(log_rho, (0, 1))(eps, z)
    np.testing.assert_allclose((chain.eps - eps) / 0.5, to_eps, atol=1e-6)
    np.testing.assert_allclose((chain.z - z) / 0.25, to_z, atol=2e-6)


@pytest.mark.parametrize(
    ("theta", "cancellation", "known"),
    [
        (0.5, "none", (0.0242, 0.1323, 0.1835)),
        (0.5, "full", (0.0240, 0.1312, 0.1820)),
        (2.0, "none", (-0.0964, -0.3824, -0.4311)),
        (2.0, "full", (-0.0956, -0.3788, -0.4267)),
        (1.0, "none", (0.0, 0.0, 0.0)),
        (1.0, "full", (0.0, 0.0, 0.0)),
    ],
)
def test_the_ascent_direction_of_a_chain(theta, cancellation, known):
    for number, value in zip((1, 8, 16), known, strict=True):
        chain = impulses(theta, number, GAMMA, 0.0016)
        found = expected(CANCELLATIONS[cancellation](chain), chain.z)
        assert found == pytest.approx(value, abs=5.5e-5)


def test_noise_of_a_chain_at_a_matched_student():
    for number, variance in ((1, 1.0256), (8, 1.0816), (16, 1.0866), (80, 1.0870)):
        chain = impulses(1.0, number, GAMMA, 0.0)
        assert expected(chain.eps, chain.eps) == pytest.approx(variance, abs=5.5e-5)
        assert np.abs(CANCELLATIONS["full"](chain)).max() < 1e-7


def test_every_noise_of_a_chain_is_accounted_for():
    """Of a generator that is not linear; K = 5."""
    size, number = 8, 5
    noise, z_noise = jax.random.normal(jax.random.key(1), (2, number, size, 2))
    z, eps = jax.random.normal(jax.random.key(2), (2, size, 2))
    chain = em_distillation.langevin(
        lambda z: jnp.sin(2 * z) + 0.3 * z[:, ::-1],
        lambda z_t: jnp.tanh(3 * z_t) - 0.5 * z_t**2,
        z,
        eps,
        lambda index: (noise[index], z_noise[index]),
        alpha=jnp.full(size, 0.8),
        sigma=jnp.full(size, 0.6),
        gamma_eps=GAMMA,
        gamma_z=0.01,
        num_steps=number,
    )
    left = (1 - GAMMA) ** np.arange(number - 1, -1, -1)
    scaled = (2 * GAMMA) ** 0.5 * noise
    propagated = np.einsum("k,kbd->bd", left, scaled)
    first = (1 - GAMMA) ** number * eps
    known = {
        "none": chain.eps,
        "chain": chain.eps - propagated,
        "plain": chain.eps - eps - scaled.sum(0),
        "full": chain.eps - propagated - first,
    }
    for name, residual in known.items():
        found = CANCELLATIONS[name](chain)
        np.testing.assert_allclose(found, residual, atol=1e-5, err_msg=name)
    assert float(jnp.abs(chain.drift).mean()) > 0.1


def test_without_a_student_score_the_student_collapses():
    """Score distillation: D of p(z_t | z) in place of p(z_t), a negative control."""
    for theta in (0.5, 1.0, 2.0):
        x = theta * jnp.eye(4)[0][:, None]

        def pull(z_t, x=x):
            return toys.exact(z_t, jnp.full(4, T), 1.0).x - x

        chain = impulses(theta, 1, GAMMA, 0.0, pull=pull)
        # -gamma alpha² theta / V_q: towards zero from everywhere, from theta = c too.
        known = -GAMMA * 0.5 * theta
        assert expected(chain.drift, chain.z) == pytest.approx(known, rel=1e-5)


def test_a_matched_student_has_no_gradient_and_others_go_to_it():
    objective = make(num_langevin_steps=4, gamma_z=0.001, noise_power=1.0)
    # What is left is the rounding of the two scores, at 6e-8, times 1 / sigma.
    assert abs(float(scores.slope(objective, scores.C))) < 2e-5
    noisy = make(num_langevin_steps=4, cancellation="none", noise_power=1.0)
    assert abs(float(scores.slope(noisy, scores.C))) > 2e-3
    starts = [0.3 * scores.C, 3 * scores.C, -0.3 * scores.C]
    ends = scores.flow(objective, starts, rate=0.1, num_steps=100)
    # Every example's gradient vanishes there, so the end is exact.
    np.testing.assert_allclose(ends, np.sign(starts) * scores.C, rtol=1e-3)


def test_cancellation_lowers_the_variance_of_the_gradient():
    keys = jax.random.split(jax.random.key(3), 64)

    def spread(cancellation):
        objective = make(cancellation=cancellation, noise_power=1.0)
        slope = functools.partial(scores.slope, objective, 0.7, size=4)
        return float(jax.jit(jax.vmap(lambda key: slope(key=key)))(keys).var())

    assert spread("full") < 0.05 * spread("none")
