"""Distribution matching: its gradient, its fixed points, and what pairs add."""

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from configs.distillation import distribution_matching, distribution_matching_2
from diffusionlab.distillation import base, fake_score, generator
from diffusionlab.distillation.distribution_matching import (
    DISTANCES,
    DistributionMatching,
    direction,
    surrogate,
)
from diffusionlab.samplers.ddim import Ddim

C = scores.C
PAIRS = dict(regression_weight=0.25, sampler=Ddim(num_steps=4))


def make(**fields):
    return scores.make(DistributionMatching, **{"regression_weight": 0.0, **fields})


def some(*shape):
    key = jax.random.key(len(shape))
    return jax.random.normal(key, shape)


def test_gradient_of_the_surrogate_is_g_over_the_size():
    x, g = some(3, 4), jnp.arange(12.0).reshape(3, 4) - 5
    found = jax.grad(lambda x: surrogate(x, g).sum())(x)
    np.testing.assert_allclose(found, g / 4, rtol=1e-6)
    still = jax.lax.stop_gradient
    paper = jax.grad(lambda x: 0.5 * base.mean((x - still(x - g)) ** 2).sum())(x)
    np.testing.assert_allclose(found, paper, atol=1e-6)


def test_direction_is_the_difference_of_scores_without_its_last_alpha():
    t, theta = jnp.float32(0.4), 0.5
    alpha, sigma = scores.PROCESS.schedule.alpha_sigma(t)
    z, x = some(5, 3), some(5, 3)
    v_data, v_fake = (alpha**2 * c**2 + sigma**2 for c in (C, theta))
    taught, learned = (alpha * c**2 / v * z for c, v in ((C, v_data), (theta, v_fake)))
    difference = -z / v_fake + z / v_data  # of the scores, student minus teacher
    size = jnp.abs(x - taught).mean(axis=1, keepdims=True)
    expected = sigma**2 / alpha / size * difference
    found = direction(x, taught, learned)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    slope = jax.grad(lambda *a: direction(*a).sum(), (0, 1, 2))(x, taught, learned)
    assert not any(np.any(part) for part in slope)
    # A sample that the teacher keeps as it is.
    assert np.all(np.isfinite(direction(taught, taught, learned)))


def test_matched_student_stays_and_others_come_to_it_from_both_sides():
    objective = make()
    assert scores.slope(objective, C) == scores.slope(objective, -C) == 0
    found = scores.flow(objective, [0.3 * C, 3 * C, -0.3 * C], rate=0.05)
    # Rates near the end are about rate / 3 per step: nothing is left after 300.
    np.testing.assert_allclose(found, [C, C, -C], atol=2e-3)


def test_gradients_stop_at_all_networks_but_those_of_the_phase():
    objective = make()
    for phase, trained in (("student", "student"), ("aux", "aux")):
        loss, found = objective.phases[phase].loss, scores.params(0.5)
        own = {trained: found[trained]}

        def value(own, rest, loss=loss):
            return loss(own, scores.inputs(rest, size=16))[0]

        moved, frozen = jax.grad(value, (0, 1))(own, found)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
        assert np.any(jax.tree.leaves(moved[trained])[0])
        assert objective.phases[phase].trains == (trained,)


def test_score_network_learns_the_samples_with_the_weight_of_edm():
    objective, size = make(), 8
    found, key = scores.params(0.5), jax.random.key(3)
    given = scores.inputs(found, key, size)
    value, metrics = fake_score.loss(objective, {"aux": found["aux"]}, given)
    keys = base.split(key, 4)
    shape = given.batch["x"].shape
    noise = generator.start(objective, found["student"], keys[0], shape, {}).noise
    x = 0.5 * noise
    t, _ = objective.times.sample(keys[1], size, scores.PROCESS.schedule)
    z_t, _ = scores.PROCESS.corrupt(keys[2], x, t)
    alpha, sigma = scores.PROCESS.schedule.alpha_sigma(t)
    x_hat = (alpha * 0.25 / (alpha**2 * 0.25 + sigma**2))[:, None] * z_t
    weight = (alpha / sigma) ** 2 + 1.0
    expected = weight * ((x - x_hat) ** 2).mean(axis=1)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["aux_loss"][0] / size, value, rtol=1e-6)
    total, count = metrics["aux_loss_by_logsnr"]
    assert count.sum() == size
    np.testing.assert_allclose(total.sum() / size, value, rtol=1e-5)


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_pairs_add_the_distance_of_what_the_student_makes_of_their_noise(distance):
    plain, objective = make(), make(**PAIRS, distance=distance)
    assert (plain.num_pairs, objective.num_pairs) == (0, 10_000)
    found = scores.params(0.5)
    given = scores.inputs(found, size=16)
    # Pairs (noise, C noise), and a student that makes 0.5 noise.
    error = (C - 0.5) ** 2 * (given.batch["noise"] ** 2).mean(axis=1)
    h = 0.00054
    far = {"squared": error, "pseudo_huber": jnp.sqrt(error + h**2) - h}[distance]
    values, slopes = zip(
        *(
            jax.value_and_grad(lambda p, o=o: o.loss(p, given)[0])(
                {"student": found["student"]}
            )
            for o in (plain, objective)
        ),
        strict=True,
    )
    np.testing.assert_allclose(values[1] - values[0], 0.25 * far.mean(), rtol=1e-4)
    # d error / d theta = 2 (theta - C) noise².
    slope = -2 / (C - 0.5) * error
    if distance == "pseudo_huber":
        slope = slope / (2 * jnp.sqrt(error + h**2))
    added = slopes[1]["student"]["a"] - slopes[0]["student"]["a"]
    np.testing.assert_allclose(added, 0.25 * slope.mean(), rtol=1e-4)
    metrics = objective.loss({"student": found["student"]}, given)[1]
    np.testing.assert_allclose(metrics["regression"][0] / 16, far.mean(), rtol=1e-5)


def test_metrics_say_how_far_apart_the_scores_are():
    found = scores.params(0.5)
    given = scores.inputs(found, size=2048)
    _, metrics = make().loss({"student": found["student"]}, given)
    # The variance of 0.5 eps, from 16,384 numbers: 1.1 % is one standard deviation.
    np.testing.assert_allclose(metrics["student_variance"][0], 0.25, rtol=0.05)
    total, count = metrics["score_difference_by_logsnr"]
    assert total.shape == count.shape == (10,)
    np.testing.assert_allclose(total.sum(), metrics["score_difference"][0], rtol=1e-5)
    assert metrics["loss"][0] > 0
    _, matched = make().loss({"student": scores.params(C)["student"]},
                             scores.inputs(scores.params(C)))  # fmt: skip
    assert matched["loss"][0] == matched["score_difference"][0] == 0


@pytest.mark.parametrize("phase", ["aux", "student"])
@pytest.mark.parametrize(
    "fields", [{}, dict(guidance_scale=2.0, num_steps=2), PAIRS], ids=str
)
def test_cost_of_a_step(phase, fields):
    fields = {"regression_weight": 0.0, **fields}
    if phase == "aux" and fields["regression_weight"]:
        pytest.skip("as without pairs")
    found, said = scores.evaluations(DistributionMatching, phase, **fields)
    np.testing.assert_allclose(found, said, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(teacher=None), "config.teacher"),
        (dict(guidance_scale=2.0), "guidance_scale"),
        (dict(num_steps=0), "num_steps"),
        (dict(aux_steps=0), "aux_steps"),
        (dict(first_logsnr=99.0), "first_logsnr"),
        (dict(min_t=0.5, max_t=0.5), "min_t"),
        (dict(max_t=1.1), "min_t"),
        (dict(regression_weight=-1.0), "regression_weight"),
        (dict(PAIRS, num_steps=2), "regression_weight"),
        (dict(PAIRS, sampler=None), "sampler"),
        (dict(PAIRS, regression_pairs=0), "regression_pairs"),
        (dict(distance="lpips"), "distance"),
    ],
)
def test_what_does_not_fit_is_named(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        make(**fields)


@pytest.mark.parametrize("size", ["", "mixture"])
def test_variants_of_the_configs_are_with_pairs_and_without_a_head(size):
    named = lambda word: "_".join(filter(None, (size, word)))  # noqa: E731
    pairs = distribution_matching.get_config(named("pairs")).objective
    plain = distribution_matching.get_config(size).objective
    assert (pairs.regression_weight, plain.regression_weight) == (0.25, 0.0)
    assert pairs.sampler.name == "ddim" and pairs.num_steps == 1
    bare = distribution_matching_2.get_config(named("plain"))
    assert bare.objective.gan_weight == 0 and "discriminator" not in bare.networks
    assert set(bare.optim) == {"student", "aux"}
    whole = distribution_matching_2.get_config(size)
    assert set(whole.optim) == {"student", "aux", "discriminator"}
    whole.objective.first_logsnr = -3.0
    assert whole.sampler.grid.first_logsnr == -3.0
