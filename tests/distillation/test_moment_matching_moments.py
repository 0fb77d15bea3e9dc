"""Section by section, the moments that moment matching finds on N(0, c²) data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from moments import (
    PROCESS,
    draws,
    moments,
    posterior,
    replace_noise,
    replace_times,
    scales,
    signs,
    slope,
    total,
)
from scipy import optimize

from diffusionlab.distillation import moment_matching
from diffusionlab.distillation.moment_matching import MomentMatching
from diffusionlab.objectives import weightings
from diffusionlab.types import Network, Prediction

WEIGHTS = {"flat": weightings.X(), "v": weightings.V()}


def make(c=0.5, network=None, **fields):
    fields = {
        "process": PROCESS,
        "networks": {"denoiser": network or toys.linear()},
        "spec": toys.SPEC,
        "teacher": toys.teacher(c),
        "weighting": weightings.V(),
        **fields,
    }
    return MomentMatching(**fields)


def see(x, a=0.0, kappa=0.0):
    return toys.inputs(x, params={"student": slope(a), "aux": slope(kappa)})


# Section 11, item 1.
def test_posterior_has_the_marginal_of_the_data():
    t, s, c = 0.75, 0.5, 0.5
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))

    def at(z, x, noise):
        alpha, sigma = PROCESS.schedule.alpha_sigma(jnp.float32(t))
        found = Prediction(x, (z - alpha * x) / sigma)
        times = jnp.float32([t]), jnp.float32([s])
        return float(moment_matching.step(PROCESS, found, noise, *times)[0, 0])

    a_z, a_x, std = at(one, zero, zero), at(zero, one, zero), at(zero, zero, one)
    np.testing.assert_allclose((a_z, a_x), (0.317025, 0.585786), atol=1e-6)
    np.testing.assert_allclose(std**2, 0.414214, atol=1e-6)
    np.testing.assert_allclose((a_z, a_x, std**2), posterior(t, s), atol=1e-6)
    # x = a z + b xi is a draw from q(x | z_t).
    alpha, sigma = scales(t)
    a, b = alpha * c**2 / total(t, c), c * sigma / np.sqrt(total(t, c))
    variance = (a_z + a_x * a) ** 2 * total(t, c) + (a_x * b) ** 2 + std**2
    np.testing.assert_allclose(variance, total(s, c), rtol=1e-5)


# Item 2.
@pytest.mark.parametrize(("average", "factor"), [(True, 0.5), (False, 1.0)])
def test_best_aux_is_the_mean_of_both_moments(monkeypatch, average, factor):
    a, t, s, c = 0.2, 0.75, 0.5, 0.5
    student, data = moments(a, t, s, c)
    best = data + factor * (student - data)
    if average:
        np.testing.assert_allclose(best, 0.207827, atol=1e-6)
    x, noise = draws(c)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, t, s)
    objective = make(c, average_targets=average)

    def gradient(kappa):
        inputs = see(x, a=a)
        return jax.grad(lambda p: objective.aux_loss({"aux": p}, inputs)[0])(
            slope(kappa)
        )["a"]

    assert abs(gradient(best)) < 1e-6
    assert gradient(best - 0.01) < -1e-3 and gradient(best + 0.01) > 1e-3


def descend(objective, x, a, rate, steps=400):
    """Returns the slope of the student after both phases in turns, by gradient."""
    student = jax.grad(lambda p, i: objective.student_loss({"student": p}, i)[0])
    aux = jax.grad(lambda p, i: objective.aux_loss({"aux": p}, i)[0])

    def turn(slopes, _):
        a, kappa = slopes
        kappa -= 0.1 * aux(slope(kappa), see(x, a, kappa))["a"]
        a -= rate * student(slope(a), see(x, a, kappa))["a"]
        return (a, kappa), None

    start = jnp.float32(a), jnp.float32(0.0)
    return float(jax.lax.scan(turn, start, None, length=steps)[0][0])


# Items 3 and 4.
@pytest.mark.parametrize("weight", ["flat", "v"])
@pytest.mark.parametrize(("s", "rate"), [(0.3, 0.3), (0.8, 3.0)])
def test_one_step_student_reaches_the_standard_deviation_at_every_s(
    monkeypatch, s, rate, weight
):
    x, noise = draws(0.5)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, 1.0, s)
    objective = make(0.5, num_steps=1, weighting=WEIGHTS[weight])
    for sign in (1, -1):
        found = descend(objective, x, sign * 0.1, rate)
        np.testing.assert_allclose(found, sign * 0.5, atol=1e-3)


def with_best_aux(objective, x, a, s, c):
    """Returns the gradient of a student of one step whose aux is always right."""
    inputs = see(x, a, sum(moments(a, 1.0, s, c)) / 2)
    loss = lambda p: objective.student_loss({"student": p}, inputs)[0]  # noqa: E731
    return jax.grad(loss)(slope(a))["a"]


def test_zero_is_an_unstable_fixed_point_of_one_step(monkeypatch):
    s, c = 0.5, 0.5
    x, noise = draws(c)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, 1.0, s)
    objective = make(c, num_steps=1)
    low, zero, high, higher = (
        float(with_best_aux(objective, x, a, s, c)) for a in (-0.01, 0.0, 0.01, 0.02)
    )
    assert abs(zero) < 1e-6
    assert high < -1e-3 and low > 1e-3
    np.testing.assert_allclose(higher / high, 2, rtol=0.01)


@pytest.mark.parametrize("start", [0.3, 3.0])
def test_students_come_from_both_sides_and_keep_their_sign(monkeypatch, start):
    s, c = 0.5, 0.5
    x, noise = draws(c)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, 1.0, s)
    objective = make(c, num_steps=1)

    def body(a, _):
        a -= 0.1 * with_best_aux(objective, x, a, s, c)
        return a, a

    for sign in (1, -1):
        begin = jnp.float32(sign * start * c)
        end, path = jax.lax.scan(body, begin, None, length=400)
        np.testing.assert_allclose(end, sign * c, atol=1e-3)
        assert np.all(sign * path > 0)


def test_one_pair_of_times_has_the_root_of_its_moments(monkeypatch):
    t, s, c = 0.75, 0.5, 0.5
    gap = lambda a: np.subtract(*moments(a, t, s, c))  # noqa: E731
    root = optimize.brentq(gap, 1e-3, 2)
    alpha, sigma = scales(t)
    ends = alpha * c**2 / total(t, c), c / np.sqrt(total(t, c))
    np.testing.assert_allclose(moments(0.1, t, s, c)[1], 0.282843, atol=1e-6)
    np.testing.assert_allclose(root, 0.395095, atol=1e-6)
    np.testing.assert_allclose(ends, (0.107475, 0.529950), atol=1e-6)
    np.testing.assert_allclose([gap(a) for a in ends], (-0.2159, 0.1042), atol=1e-4)
    x, noise = draws(c)
    replace_noise(monkeypatch, noise)
    replace_times(monkeypatch, t, s)
    np.testing.assert_allclose(descend(make(c), x, 0.1, rate=0.3), root, atol=1e-4)


def table():
    """x_hat = a(t) z with a table of a; as aux, its own mean moment with the teacher's.

    Only for times on the grid, where s belongs to one t.
    """

    def apply(params, z, cond, *, train=False, key=None):
        a = params["a"]
        where = jnp.ceil(cond["t"] * len(a) - 1e-4).astype(int) - 1
        if "c" not in params:
            return a[where][:, None] * z
        t, s, c = (where + 1) / len(a), cond["t"], params["c"]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(
            PROCESS.schedule.alpha_sigma, (t, s)
        )
        ratio = jnp.exp(PROCESS.schedule.logsnr(t) - PROCESS.schedule.logsnr(s))
        b = (
            alpha_t * sigma_s**2 / (alpha_s * sigma_t**2)
            + alpha_s * (1 - ratio) * a[where]
        )
        v = sigma_s**2 * (1 - ratio)
        all_t, all_s = (q**2 * c**2 + r**2 for q, r in zip(*pairs(t, s), strict=True))
        student = a[where] * b * all_t / (b**2 * all_t + v)
        return (0.5 * (student + alpha_s * c**2 / all_s))[:, None] * z

    return Network(lambda key: {}, apply, ())


def pairs(t, s):
    return zip(*map(PROCESS.schedule.alpha_sigma, (t, s)), strict=True)


def fixed_point(k, c, flat):
    """Roots a(t) of E_s[w (kg - kq) B V] = 0, and the variance of x_hat at the end."""
    nodes, masses = np.polynomial.legendre.leggauss(200)
    found, variance = [], 1.0
    for i in range(k, 0, -1):
        t, low = i / k, (i - 1) / k
        s = low + (t - low) * (nodes + 1) / 2
        a_z, a_x, _ = posterior(t, s)
        w = 1.0 if flat else 1 + (scales(s)[0] / scales(s)[1]) ** 2

        def mean_gap(a, t=t, s=s, a_z=a_z, a_x=a_x, w=w):
            return np.sum(
                masses * w * (a_z + a_x * a) * np.subtract(*moments(a, t, s, c))
            )

        alpha, _ = scales(t)
        low_end = max(0.9 * alpha * c**2, 1e-3 * c) / total(t, c)
        found.append(optimize.brentq(mean_gap, low_end, 1.5 * c / total(t, c) ** 0.5))
        if i > 1:
            a_z, a_x, v = posterior(t, low)
            variance = (a_z + a_x * found[-1]) ** 2 * variance + v
    return np.array(found[::-1]), found[-1] ** 2 * variance / c**2


# Item 5.
@pytest.mark.parametrize(
    ("c", "weight", "ratios"),
    [
        (1.0, "flat", (1.0000, 0.8682, 0.8594, 0.9377)),
        (1.0, "v", (1.0000, 1.0849, 0.9959, 0.9974)),
        (0.5, "flat", (1.000, 0.653, 0.764, 0.893)),
        (0.5, "v", (1.000, 1.040, 1.008, 1.021)),
    ],
)
def test_fixed_points_of_grid_times(monkeypatch, c, weight, ratios):
    digits = 4 if c == 1 else 3
    for k, ratio in zip((1, 2, 4, 8), ratios, strict=True):
        a, found = fixed_point(k, c, weight == "flat")
        np.testing.assert_allclose(found, ratio, atol=0.51 * 10.0**-digits)
        if (k, c) == (2, 1.0):
            np.testing.assert_allclose(a[1], 1.0, atol=1e-6)
            np.testing.assert_allclose(
                a[0], 0.93175 if weight == "flat" else 1.04157, atol=1e-5
            )
    x, noise = draws(c, repeats=1024)
    replace_noise(monkeypatch, noise)
    s = np.repeat((np.arange(1024) + 0.5) / 1024, 8)
    replace_times(monkeypatch, (np.floor(s * 8) + 1) / 8, s)
    objective = make(
        c,
        table(),
        process=PROCESS,
        num_steps=8,
        times_option="grid",
        weighting=WEIGHTS[weight],
    )

    @jax.jit
    def gradient(a):
        params = {"aux": {"a": a, "c": c}, "student": {"a": a}}
        loss = lambda p: objective.student_loss({"student": p}, inputs)[0]  # noqa: E731
        inputs = toys.inputs(x, params=params)
        return jax.grad(loss)({"a": a})["a"]

    a = jnp.asarray(a, jnp.float32)
    size = gradient(a + 0.1)
    assert np.all(size > 0) and np.all(gradient(a - 0.1) < 0)
    assert np.all(np.abs(gradient(a)) < 0.02 * size)


def test_an_exact_posterior_sampler_has_no_gradient(monkeypatch):
    t, s, c = 0.75, 0.5, 0.5
    alpha, sigma = scales(t)

    def apply(params, z, cond, *, train=False, key=None):
        spread = params["b"] * jax.random.normal(key, z.shape) if train else 0.0
        return params["a"] * z + spread

    rows = signs(4)
    replace_noise(monkeypatch, rows[:, 1:])
    replace_times(monkeypatch, t, s)
    objective = make(c, Network(lambda key: {}, apply, ()))
    exact = alpha * c**2 / total(t, c), c * sigma / np.sqrt(total(t, c))
    data = moments(0.1, t, s, c)[1]

    def gradients(a, b):
        student = {"a": jnp.float32(a), "b": jnp.float32(b)}
        aux = {"a": jnp.float32(data), "b": jnp.float32(0)}
        inputs = toys.inputs(
            jnp.asarray(c * rows[:, :1]), params={"student": student, "aux": aux}
        )
        of_aux = jax.grad(lambda p: objective.aux_loss({"aux": p}, inputs)[0])(aux)
        return float(of_aux["a"])

    # The teacher is the best aux for it, so that the gap is 0 whatever is its factor.
    assert abs(gradients(*exact)) < 1e-6
    assert abs(gradients(exact[0], 0.9 * exact[1])) > 1e-2


def test_teachers_ancestral_sampler_has_too_little_variance():
    known = {1: 0, 2: 0.25, 4: 0.4357, 8: 0.6258, 64: 0.9311, 256: 0.9814}
    for k, variance in known.items():
        stops = jnp.arange(k, -1, -1) / k
        t, s = stops[:-1], stops[1:]
        x, eps = toys.exact(jnp.ones((k, 1)), t, 1.0)
        zero, one = jnp.zeros_like(x), jnp.ones_like(x)
        keep = moment_matching.step(PROCESS, Prediction(x, eps), zero, t, s)
        fresh = moment_matching.step(PROCESS, Prediction(zero, zero), one, t, s)
        keep, fresh = np.asarray(keep[:, 0]), np.asarray(fresh[:, 0])
        now = 1.0
        for i in range(k - 1):
            now = keep[i] ** 2 * now + fresh[i] ** 2
        np.testing.assert_allclose(float(x[-1, 0]) ** 2 * now, variance, atol=1e-4)


# Item 6.
def test_many_steps_make_the_teacher():
    k, c = np.array([16, 256]), 0.5
    i = k // 2
    t = i / k
    alpha, _ = scales(t)
    denoiser = alpha * c**2 / total(t, c)
    found = [fixed_point(n, c, False)[0][j - 1] for n, j in zip(k, i, strict=True)]
    excess = found / denoiser - 1
    assert excess[0] > 0.1 and 0 < excess[1] < 0.02
