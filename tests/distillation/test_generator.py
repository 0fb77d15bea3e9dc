"""Generators of a few steps: where they start, and the difference of two scores."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.distillation import base as distillation
from diffusionlab.distillation import fake_score, generator
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base, grids
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.types import DataSpec, Network

COSINE = Cosine()
PROCESS = Gaussian(schedule=COSINE, prediction="x")
PARAMS = {"a": jnp.float32(0.7)}


def make(num_steps, first_logsnr=-3.0):
    net = Network(None, lambda params, z, cond, **_: params["a"] * jnp.sin(z), ())
    return types.SimpleNamespace(
        num_steps=num_steps,
        first_logsnr=first_logsnr,
        process=PROCESS,
        networks={"denoiser": net},
    )


def test_times_are_equal_parts_of_the_first():
    times = generator.times(make(4))
    assert float(COSINE.logsnr(times[0])) == pytest.approx(-3.0, abs=1e-4)
    np.testing.assert_allclose(times / times[0], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)


def test_a_step_starts_where_the_sampler_leads(monkeypatch):
    """Every noise is its example's place, so that both walks draw the same."""
    number, size = 3, 64
    objective = make(number)
    noise = jnp.linspace(-2, 2, size)[:, None]
    monkeypatch.setattr(jax.random, "normal", lambda *_, **__: noise)
    monkeypatch.setattr(base, "normal", lambda *_: noise)
    started = generator.start(objective, PARAMS, jax.random.key(1), (size, 1), {})
    times = generator.times(objective)
    sampler = Consistency(num_steps=number, grid=grids.From(first_logsnr=-3.0))
    predict = lambda z, t: PROCESS.predict(0.7 * jnp.sin(z), z, t)  # noqa: E731
    z = PROCESS.prior_std(times[0]) * noise
    state = sampler.init(z, times[0])
    seen = 0
    for t, s in zip(times[:-1], times[1:], strict=True):
        here = np.asarray(started.t == t)
        seen += here.sum()
        assert here.sum() > 8
        np.testing.assert_allclose(started.z_t[here], state.z[here], atol=1e-6)
        state = sampler.step(PROCESS, predict, state, t, s, None)
    assert seen == size
    last = np.asarray(started.t == times[-2])
    made = generator.generate(objective, PARAMS, started, {})
    np.testing.assert_allclose(made[last], state.x[last], atol=1e-6)


def test_noises_of_steps_are_independent_and_examples_choose_alone():
    objective = make(2)
    started = generator.start(objective, PARAMS, jax.random.key(2), (4096, 1), {})
    late = np.asarray(started.t < generator.times(objective)[0])
    assert late.mean() == pytest.approx(0.5, abs=0.04)  # 5 standard errors
    center, noise = started.center[late, 0], started.noise[late, 0]
    assert abs(np.corrcoef(center, noise)[0, 1]) < 0.12
    assert not np.any(started.center[~late])
    assert float(started.noise.std()) == pytest.approx(1, abs=0.06)


def test_only_the_step_that_is_trained_has_a_gradient():
    objective, key = make(2), jax.random.key(3)

    def first(params):
        return generator.start(objective, params, key, (8, 1), {}).z_t.sum()

    assert float(jax.grad(first)(PARAMS)["a"]) == 0.0
    started = generator.start(objective, PARAMS, key, (8, 1), {})
    made = lambda p: generator.generate(objective, p, started, {}).sum()  # noqa: E731
    known = jnp.sin(started.z_t).sum()
    assert float(jax.grad(made)(PARAMS)["a"]) == pytest.approx(float(known), rel=1e-5)


def test_a_score_network_is_told_which_step_a_sample_is_of():
    """Otherwise it learns the mixture of what all steps make."""
    objective = make(2)
    heard = lambda params, z, cond, **_: cond["start_logsnr"][:, None] + 0 * z  # noqa: E731
    objective.networks = {"denoiser": Network(None, heard, ())}
    objective.spec = DataSpec((1,))
    inputs = types.SimpleNamespace(batch={"x": jnp.zeros((64, 1))})
    x, cond = fake_score.samples(objective, PARAMS, jax.random.key(5), inputs)
    levels = np.asarray(COSINE.logsnr(generator.times(objective)[:2]))
    assert set(np.asarray(x[:, 0])) == set(levels)  # the student hears its own
    z_t, t = jnp.ones((64, 1)), jnp.full(64, 0.5)
    of_aux = distillation.apply(objective, PARAMS, z_t, t, cond).x
    np.testing.assert_array_equal(of_aux, x)
    alone = distillation.apply(objective, PARAMS, z_t, t, {}).x
    np.testing.assert_allclose(alone, COSINE.logsnr(t)[:, None])


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.2, 0.5, 0.8, 0.999, 1.0])
def test_the_difference_of_scores_keeps_its_digits(t):
    """For v, it is alpha (v_own - v_teacher), whatever the noise level."""
    process = Gaussian(schedule=COSINE, prediction="v")
    z, own, taught = jax.random.normal(jax.random.key(4), (3, 256, 1))
    taught = own + 0.1 * taught
    times = jnp.full(256, t)
    gap = generator.score_gap(
        process,
        *(process.predict(raw, z, times) for raw in (taught, own)),
        times,
    )
    alpha = np.float64(COSINE.alpha_sigma(jnp.float32(t))[0])
    known = alpha * (np.float64(own) - np.float64(taught))
    # Predictions of size 3 are rounded at 2e-7. The other form of equation 2 has 2000
    # times that at its bad end, where `known` is as small as alpha.
    np.testing.assert_allclose(gap, known, atol=1e-6 * max(alpha, 1e-2) + 1e-9)


def test_the_sampler_has_to_start_where_the_generator_does():
    objective = make(2)
    grid = grids.From(first_logsnr=-3.0)
    generator.check(objective)
    generator.check_sampler(objective, Consistency(num_steps=2, grid=grid))
    with pytest.raises(ValueError, match="num_steps: is 3, but .* trains 2"):
        generator.check_sampler(objective, Consistency(num_steps=3, grid=grid))
    with pytest.raises(ValueError, match=r"grid: .*'name': 'from', 'first_logsnr': -3"):
        generator.check_sampler(objective, Consistency(num_steps=2))
    with pytest.raises(ValueError, match="^name: Ddim with 2 steps .*'consistency'"):
        generator.check_sampler(objective, Ddim(num_steps=2, grid=grid))
    generator.check_sampler(make(1), Ddim(num_steps=1, grid=grid))
    with pytest.raises(ValueError, match="^first_logsnr: must be between the ends"):
        generator.check(make(1, first_logsnr=-99.0))
    with pytest.raises(ValueError, match="num_steps: must be at least 1"):
        generator.check(make(0))
