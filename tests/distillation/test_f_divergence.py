"""f-divergences: their weights, their reduction to DMD2, and what they cover."""

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from diffusionlab.distillation.distribution_matching_2 import DistributionMatching2
from diffusionlab.distillation.f_divergence import (
    WEIGHTS,
    FDivergence,
    density_ratio,
    weight,
)

C = scores.C
# The functions f of E_student[f(p_teacher / p_student)].
FUNCTIONS = {
    "reverse_kl": lambda r: -jnp.log(r),
    "forward_kl": lambda r: r * jnp.log(r),
    "jensen_shannon": lambda r: r * jnp.log(r) - (1 + r) * jnp.log((1 + r) / 2),
    "softened_reverse_kl": lambda r: (1 + r) * jnp.log((1 + r) / r),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "squared_hellinger": lambda r: -4 * jnp.sqrt(r),
    "jeffreys": lambda r: (r - 1) * jnp.log(r),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse_kl", 1.0),
        ("forward_kl", 4.0),
        ("jensen_shannon", 0.8),
        ("softened_reverse_kl", 0.2),
        ("neyman", 0.25),
        ("squared_hellinger", 2.0),
        ("jeffreys", 5.0),
    ],
)
def test_weight_at_a_ratio_of_4(name, expected):
    assert set(WEIGHTS) == set(FUNCTIONS)
    r = density_ratio(jnp.log(jnp.float32(4)))
    np.testing.assert_allclose(WEIGHTS[name](r), expected, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weight_is_the_second_derivative_times_the_square(name):
    r = jnp.array([0.2, 1.0, 7.0])
    second = jax.vmap(jax.grad(jax.grad(FUNCTIONS[name])))(r)
    np.testing.assert_allclose(WEIGHTS[name](r), second * r**2, rtol=2e-4)


def test_weights_have_mean_one_and_are_one_where_nothing_differs():
    logits = jnp.array([-1.0, 0.0, 2.0, 0.5])
    for name in WEIGHTS:
        np.testing.assert_allclose(weight(name, logits).mean(), 1.0, rtol=1e-6)
        np.testing.assert_array_equal(weight(name, jnp.zeros(3)), 1.0)


def test_ratio_is_clipped_and_finite():
    found = density_ratio(jnp.array([-1e9, -2.0, 0.0, 2.9, 4.0, 1e9]))
    expected = [0.1, np.exp(-2.0), 1.0, np.exp(2.9), 20.0, 20.0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_reverse_kl_is_dmd2_and_so_is_any_divergence_without_a_difference():
    found = scores.params(0.5)
    given, own = scores.inputs(found, size=16), {"student": found["student"]}
    plain = scores.make(DistributionMatching2, num_steps=1)
    reverse = scores.make(FDivergence, divergence="reverse_kl")
    forward = scores.make(FDivergence, divergence="forward_kl")
    value = lambda o, given: jax.grad(lambda p: o.loss(p, given)[0])(own)  # noqa: E731
    expected = value(plain, given)["student"]["a"]
    np.testing.assert_allclose(value(reverse, given)["student"]["a"], expected, 1e-5)
    assert abs(value(forward, given)["student"]["a"] / expected - 1) > 5e-3
    silent = found["discriminator"] | {"strength": jnp.float32(0)}
    silent = given._replace(params=found | {"discriminator": silent})
    same = [value(o, silent)["student"]["a"] for o in (plain, forward)]
    np.testing.assert_allclose(*same, rtol=1e-5)


def test_forward_kl_has_the_gradient_of_the_forward_kl():
    # alpha² = sigma² = 1/2, c = 1: p = N(0, 1), and x = theta eps.
    theta, (nodes, weights) = 0.9, scores.normal_grid()
    v = 0.5 * theta**2 + 0.5
    z_t = 0.5**0.5 * (theta * nodes[:, 0] + nodes[:, 1])
    logits = 0.5 * (z_t**2 * (1 / v - 1) + jnp.log(v))
    h = WEIGHTS["forward_kl"](density_ratio(logits))
    difference = -z_t / v + z_t  # of the scores, student minus teacher
    found = (weights * h * difference * 0.5**0.5 * nodes[:, 0]).sum()
    # KL(p, q) = (1 / v + log v - 1) / 2 with dv/dtheta = theta.
    expected = 0.5 * theta * (1 / v - 1 / v**2)
    # r is within its ends but for |z| > 7.
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("divergence", sorted(WEIGHTS))
def test_matched_student_stays(divergence):
    objective = scores.make(FDivergence, divergence=divergence)
    assert scores.slope(objective, C) == 0


def test_others_come_to_it_from_both_sides():
    objective = scores.make(FDivergence)
    found = scores.flow(objective, [0.3 * C, 3 * C, -0.3 * C], rate=0.05)
    np.testing.assert_allclose(found, [C, C, -C], atol=2e-3)


def test_student_metrics_say_what_the_ratio_is():
    found = scores.params(C)
    objective = scores.make(FDivergence)
    own, given = {"student": found["student"]}, scores.inputs(found, size=16)
    _, metrics = objective.loss(own, given)
    assert metrics["density_ratio"][0] == 16
    assert metrics["ratio_at_its_ends"][0] == 0
    _, metrics = objective.loss(own, given._replace(params=scores.params(0.01)))
    assert metrics["ratio_at_its_ends"][0] > 0


def test_cost_of_a_step():
    for phase in ("aux", "student"):
        fields = dict(num_steps=2, gan_weight=1.0)
        found, said = scores.evaluations(FDivergence, phase, **fields)
        np.testing.assert_allclose(found, said, rtol=0.1)


def test_an_unknown_divergence_is_named():
    with pytest.raises(ValueError, match="^divergence: .*jensen_shannon"):
        scores.make(FDivergence, divergence="kl")


def cover(divergence, mean, std, num_steps=400):
    """The best N(mean, std²) for two modes at -2 and 2, of std 0.3, by exact scores."""
    normal = jax.scipy.stats.norm
    quantiles = [normal.ppf((jnp.arange(n) + 0.5) / n) for n in (51, 21)]
    grids = jnp.meshgrid(*quantiles, jnp.linspace(0.05, 0.95, 6), indexing="ij")
    n, eps, t = (grid.ravel() for grid in grids)
    alpha, sigma = scores.PROCESS.schedule.alpha_sigma(t)

    def data(z):
        v = jnp.sqrt((0.3 * alpha) ** 2 + sigma**2)
        modes = [normal.logpdf(z, side * alpha, v) for side in (-2, 2)]
        return jnp.logaddexp(*modes) - jnp.log(2.0)

    def body(params, _):
        mean, std = params
        z = alpha * (mean + std * n) + sigma * eps
        v = jnp.sqrt((std * alpha) ** 2 + sigma**2)

        def log_ratio(z):
            return data(z) - normal.logpdf(z, alpha * mean, v)

        # sigma² / alpha times the difference of the scores: x_aux - x_teacher.
        g = -jax.grad(lambda z: log_ratio(z).sum())(z) * sigma**2 / alpha
        g = weight(divergence, log_ratio(z)) * g
        return (mean - 0.07 * g.mean(), std - 0.07 * (g * n).mean()), None

    start = jnp.float32(mean), jnp.float32(std)
    return jax.lax.scan(body, start, None, length=num_steps)[0]


def test_forward_kl_covers_both_modes_and_neyman_drops_one():
    run = jax.jit(cover, static_argnums=0)
    found = {name: run(name, 1.5, 0.5) for name in WEIGHTS}
    # The forward KL divergence matches moments: a variance of 4 + 0.09.
    np.testing.assert_allclose(found["forward_kl"], [0, 4.09**0.5], atol=0.06)
    spread = {name: float(std) for name, (_, std) in found.items()}
    order = ["forward_kl", "jensen_shannon", "squared_hellinger", "jeffreys"]
    order += ["reverse_kl", "softened_reverse_kl", "neyman"]
    assert sorted(spread, key=spread.get, reverse=True) == order
    mean, std = found["neyman"]
    assert 1.4 < mean < 2 and std < 0.3
