"""The laws of training times; means over a law are lattice rules, not random."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import registry, schedules
from diffusionlab.objectives import weightings
from diffusionlab.schedules import times
from diffusionlab.schedules.cosine import Cosine
from diffusionlab.schedules.discrete_beta import DiscreteBeta
from diffusionlab.schedules.edm import Edm
from diffusionlab.schedules.flow import Flow
from diffusionlab.schedules.importance import Importance
from diffusionlab.schedules.variance_exploding import VarianceExploding

LAWS = list(schedules.REGISTRY["times"])
ARGUMENTS = {"importance": {"weighting": {"name": "sigmoid", "bias": -1.0}}}
NUM = 1 << 15


def build(name, **options):
    block = {"name": name, **ARGUMENTS.get(name, {}), **options}
    return registry.build("times", block, "config.times")


@functools.cache
def drawn(law, schedule, key=3):
    """A stratified sample: a lattice rule with NUM points and one random shift."""
    sample = jax.jit(lambda key: law.sample(key, NUM, schedule))
    return tuple(np.float64(q) for q in sample(jax.random.key(key)))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("stratified", [True, False])
def test_times_are_in_the_unit_interval(name, stratified):
    law, key = build(name, stratified=stratified), jax.random.key(1)
    t, weight = jax.jit(lambda key: law.sample(key, 512, VarianceExploding()))(key)
    assert t.shape == weight.shape == (512,)
    assert t.dtype == weight.dtype == jnp.float32
    assert np.min(t) >= 0 and np.max(t) <= 1 and np.min(weight) > 0
    if name != "importance":
        np.testing.assert_array_equal(weight, 1.0)


@pytest.mark.parametrize("name", LAWS)
def test_strata_put_half_of_each_batch_below_the_median(name):
    schedule, keys = Cosine(), jax.random.split(jax.random.key(5), 8)
    median = np.median(drawn(build(name), schedule)[0])
    laws = [build(name, stratified=stratified) for stratified in (True, False)]
    even, free = jax.jit(
        jax.vmap(lambda key: [law.sample(key, 64, schedule)[0] for law in laws])
    )(keys)
    assert np.abs(np.sum(even < median, axis=1) - 32).max() <= 1
    # Eight binomials with a standard deviation of 4: all within 1 has p < 1e-4.
    assert np.abs(np.sum(free < median, axis=1) - 32).max() > 1


def test_stratified_times_have_one_value_per_stratum():
    t, _ = times.Uniform().sample(jax.random.key(2), 64, None)
    np.testing.assert_array_equal(np.sort(np.floor(np.sort(t) * 64)), np.arange(64))


@pytest.mark.parametrize("mean", [0.0, -0.8])
def test_logit_normal_has_its_moments_and_can_be_weighted_back(mean):
    law = times.LogitNormal(mean=mean, std=1.3, as_uniform=True)
    t, weight = law.sample(jax.random.key(3), 1 << 16, None)
    logit = jnp.log(t) - jnp.log1p(-t)
    assert float(logit.mean()) == pytest.approx(mean, abs=2e-3)
    assert float(logit.std()) == pytest.approx(1.3, rel=2e-3)
    # The first and the last of 2^16 strata hold a quantile of 4.17 standard deviations;
    # one draw stands for the uniform times beyond it, all of which may be missed.
    missed = sum(1 / (1 + math.exp(4.17 * 1.3 + sign * mean)) for sign in (-1, 1))
    for power in (0, 1, 2):
        moment = float((weight * t**power).mean())
        assert moment == pytest.approx(1 / (power + 1), abs=missed)


WEIGHTED_BACK = [
    # The law reaches well beyond the ends of its schedule, so weights are bounded.
    (times.LogNormal(mean=-1.0, std=3.0, as_uniform=True), Edm()),
    (times.LogNormal(mean=-1.0, std=2.5, as_uniform=True), VarianceExploding()),
    (times.LogsnrUniform(as_uniform=True), Edm()),
    (times.LogsnrUniform(as_uniform=True), Flow(logsnr_min=-8.0, logsnr_max=8.0)),
    (times.LogsnrUniform(as_uniform=True), DiscreteBeta(num_timesteps=100)),
    (Importance(weighting=weightings.Sigmoid(bias=-1.0)), Cosine()),
    (Importance(weighting=weightings.Elbo(), data_std=0.5, floor=0.2), Flow()),
    (Importance(weighting=weightings.Eps(), num_cells=3), VarianceExploding()),
]


@pytest.mark.parametrize(("law", "schedule"), WEIGHTED_BACK)
def test_weights_bring_back_the_uniform_mean(law, schedule):
    t, weight = drawn(law, schedule)
    for function, mean in [
        (np.ones_like, 1.0),
        (lambda t: t, 0.5),
        (lambda t: np.cos(3 * t), math.sin(3) / 3),
    ]:
        # The rule is wrong by the range of the terms over NUM, where they jump: at the
        # ends of the interval, and once or twice in each cell or step of a table.
        terms = weight * function(t)
        error = (
            4 * np.ptp(terms) / NUM + np.abs(np.diff(weight[np.argsort(t)])).sum() / NUM
        )
        assert error < 5e-3
        assert terms.mean() == pytest.approx(mean, abs=error + 2e-5)


@pytest.mark.parametrize("mean", [-1.2, 0.4])
def test_log_normal_is_that_of_the_noise_level(mean):
    schedule = Edm(sigma_min=1e-4, sigma_max=1e4, preserving=False)
    t, weight = drawn(times.LogNormal(mean=mean), schedule)
    log_sigma = np.log(np.float64(schedule.alpha_sigma(t)[1]))
    # 2^15 strata; what lies beyond four standard deviations changes the std by 3e-4.
    assert log_sigma.mean() == pytest.approx(mean, abs=1e-3)
    assert log_sigma.std() == pytest.approx(1.2, rel=2e-3)
    np.testing.assert_array_equal(weight, 1.0)


def test_log_normal_is_cut_at_the_ends_of_the_schedule():
    # sigma <= 1 leaves out half of N(0, 1): the other half has mean -sqrt(2 / pi).
    schedule = Edm(sigma_max=1.0)
    t, _ = drawn(times.LogNormal(mean=0.0, std=1.0), schedule)
    log_sigma = -0.5 * np.float64(schedule.logsnr(t))
    assert log_sigma.mean() == pytest.approx(-math.sqrt(2 / math.pi), abs=1e-3)
    assert np.sum(t == 1.0) <= 1


@pytest.mark.parametrize("ends", [(None, None), (-4.0, 5.0), (-40.0, 0.0)])
def test_logsnr_uniform_is_uniform_in_its_part(ends):
    law = times.LogsnrUniform(logsnr_min=ends[0], logsnr_max=ends[1])
    t, _ = drawn(law, Cosine())
    low, high = max(ends[0] or -15.0, -15.0), 15.0 if ends[1] is None else ends[1]
    logsnr = np.sort(np.float64(Cosine().logsnr(t)))
    expected = low + (high - low) * (np.arange(NUM) + 0.5) / NUM
    np.testing.assert_allclose(logsnr, expected, atol=(high - low) / NUM + 1e-4)


def test_weights_of_a_part_bring_back_the_uniform_mean_of_that_part():
    law = times.LogsnrUniform(logsnr_min=-4.0, logsnr_max=5.0, as_uniform=True)
    t, weight = drawn(law, Cosine())
    first, last = (float(Cosine().inverse(logsnr)) for logsnr in (5.0, -4.0))
    assert (weight * t).mean() == pytest.approx((first + last) / 2, abs=1e-4)


def test_discrete_times_are_the_steps_of_the_chain():
    law = times.Discrete(num_timesteps=64)
    t, _ = drawn(law, None)
    steps, counts = np.unique(np.round(t * 63), return_counts=True)
    np.testing.assert_array_equal(steps, np.arange(64))
    np.testing.assert_array_equal(counts, NUM / 64)
    np.testing.assert_allclose(t, np.round(t * 63) / 63, atol=6e-8)


def test_importance_draws_in_proportion_to_the_loss_of_gaussian_data():
    weighting, std = weightings.Eps(), 0.5
    law = Importance(weighting=weighting, data_std=std, floor=1e-6, num_cells=4096)
    t, weight = drawn(law, Cosine())
    alpha, sigma = (np.float64(q) for q in Cosine().alpha_sigma(t))
    loss = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2)
    # So the weighted loss is the same at every time, but for the width of a cell:
    # half of it times the slope of log g, which is below 4 (b - a) / sin(2 theta) = 20.
    terms = (weight * loss)[t < 0.9]
    np.testing.assert_allclose(terms, terms.mean(), rtol=0.5 / 4096 * 20)
    spread = (weight * loss).std() / (weight * loss).mean()
    assert spread < 0.02 < 0.3 < loss.std() / loss.mean()


def test_importance_weights_are_bounded_by_the_floor():
    law = Importance(weighting=weightings.X(), floor=0.25)
    _, weight = drawn(law, Cosine())
    assert 1.0 < weight.max() <= 4.0


def test_a_nested_weighting_is_built_and_checked():
    assert build("importance").weighting == weightings.Sigmoid(bias=-1.0)
    with pytest.raises(ValueError, match=r"config\.times\.weighting\.name: .*'elbo'"):
        build("importance", weighting={"name": "elbow"})


@pytest.mark.parametrize(
    "build",
    [
        lambda: times.LogitNormal(std=0.0),
        lambda: times.LogNormal(std=-1.0),
        lambda: times.LogsnrUniform(logsnr_min=2.0, logsnr_max=1.0),
        lambda: times.Discrete(num_timesteps=1),
        lambda: Importance(weighting=weightings.Eps(), data_std=0.0),
        lambda: Importance(weighting=weightings.Eps(), floor=0.0),
        lambda: Importance(weighting=weightings.Eps(), floor=1.5),
        lambda: Importance(weighting=weightings.Eps(), num_cells=0),
    ],
)
def test_impossible_constants_are_refused(build):
    with pytest.raises(ValueError, match="^[a-z_]+: "):
        build()
