"""DMD2: the discriminator on the score network, two time scales, several steps."""

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from diffusionlab.distillation import base, fake_score, generator
from diffusionlab.distillation.distribution_matching import DistributionMatching
from diffusionlab.distillation.distribution_matching_2 import (
    DistributionMatching2,
    aux_loss,
    discriminator_loss,
)
from diffusionlab.models.discriminator import Discriminator
from diffusionlab.models.mlp import MLP
from diffusionlab.models.network import as_network
from diffusionlab.samplers.base import solve
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.types import DataSpec, Prediction

C = scores.C


def make(**fields):
    return scores.make(DistributionMatching2, **{"num_steps": 1, **fields})


def value_and_slope(objective, found, size=16, key=0):
    given = scores.inputs(found, key, size)
    loss = lambda p: objective.loss(p, given)[0]  # noqa: E731
    value, slope = jax.value_and_grad(loss)({"student": found["student"]})
    return value, slope["student"]["a"]


def test_without_the_head_it_is_distribution_matching_without_pairs():
    plain = make(gan_weight=0.0)
    first = scores.make(DistributionMatching, regression_weight=0.0)
    found = scores.params(0.5)
    expected = value_and_slope(first, found)
    np.testing.assert_allclose(value_and_slope(plain, found), expected, rtol=1e-5)
    assert set(plain.roles) == {"student", "aux"}
    assert plain.phases["aux"].trains == ("aux",)
    assert set(make().roles) == {"student", "aux", "discriminator"}
    assert make().phases["aux"].trains == ("aux", "discriminator")


def test_student_climbs_the_discriminator_through_z_t():
    found, size, key = scores.params(0.5), 16, jax.random.key(2)
    slopes = [
        value_and_slope(make(gan_weight=w), found, size, key)[1] for w in (1.0, 0.5)
    ]
    keys = base.split(key, 4)
    shape = (size, scores.SIZE)
    n = generator.start(make(), found["student"], keys[0], shape, {}).z_t
    t = fake_score.between(keys[2], size, 0.02, 0.98)
    z_t, _ = scores.PROCESS.corrupt(keys[3], 0.5 * n, t)
    alpha, sigma = (q[:, None] for q in scores.PROCESS.schedule.alpha_sigma(t))
    data, fake = (alpha**2 * c**2 + sigma**2 for c in (C, 0.5))
    logit = 0.5 * (z_t**2 * (1 / fake - 1 / data) + jnp.log(fake / data)).sum(axis=1)
    # d softplus(-D) = -sigmoid(-D) dD, and dz_t / dtheta = alpha n.
    climb = (z_t * (1 / fake - 1 / data) * alpha * n).sum(axis=1)
    expected = -0.5 * (jax.nn.sigmoid(-logit) * climb).mean()
    np.testing.assert_allclose(slopes[0] - slopes[1], expected, rtol=2e-3)


def test_best_logit_is_the_log_ratio_of_densities():
    nodes, weights = scores.normal_grid(1)
    data, fake = 1.0, 0.7

    def value(strength):
        logit = lambda z: (  # noqa: E731
            0.5 * strength * (z**2 * (1 / fake - 1 / data) + jnp.log(fake / data))
        )
        z = nodes[:, 0]
        each = discriminator_loss(logit(data**0.5 * z), logit(fake**0.5 * z))
        return (weights * each).sum()

    np.testing.assert_allclose(value(0.0), 2 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(value)(1.0), 0, atol=1e-5)
    assert jax.grad(value)(0.8) < -1e-3 and jax.grad(value)(1.2) > 1e-3


def test_aux_phase_adds_the_discriminator_and_trains_both_networks():
    found = scores.params(0.5)
    given = scores.inputs(found, size=64)
    own = {name: found[name] for name in ("aux", "discriminator")}
    values = {}
    for weight in (0.0, 1.0):
        objective = make(discriminator_weight=weight)
        loss = lambda p, rest, o=objective: aux_loss(  # noqa: E731
            o, p, given._replace(params=rest)
        )
        values[weight], slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            own, found
        )
        moved, frozen = slopes
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
        assert np.any(moved["discriminator"]["strength"]) == (weight > 0)
    (without, metrics), (whole, _) = values.values()
    apart = metrics["discriminator_loss"][0] / 64
    np.testing.assert_allclose(whole - without, apart, rtol=1e-4)
    np.testing.assert_allclose(metrics["aux_loss"][0] / 64, without, rtol=1e-5)
    # The head tells 0.5 from 0.8 in eight dimensions, and not at all 0.8 from 0.8.
    assert 0.55 < metrics["discriminator_accuracy"][0] / 64 < 1
    assert apart < 2 * np.log(2)


def test_gradient_of_the_head_goes_into_the_score_network():
    spec = DataSpec((2,))
    net = as_network(MLP(spec=spec, dtype="float32", width=8, num_layers=1), spec)
    head = Discriminator(spec=spec, dtype="float32", features=8, width=8)
    networks = {"denoiser": net, "discriminator": as_network(head, spec)}
    fields = dict(networks=networks, spec=spec, discriminator_weight=1.0)
    objective = make(**fields)
    key = jax.random.key(0)
    found = {
        name: jax.tree.map(
            lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape),
            networks[role.network].init(key),
        )
        for name, role in objective.roles.items()
    }
    teacher = {"denoiser": {"c": jnp.float32(C)}}
    given = scores.inputs({**found, "teacher": teacher}, size=8, dimension=2)

    @jax.jit
    def slopes(aux):
        return [
            jax.grad(
                lambda p, o=o: aux_loss(
                    o, {"aux": p, "discriminator": found["discriminator"]}, given
                )[0]
            )(aux)
            for o in (objective, make(**{**fields, "discriminator_weight": 0.0}))
        ]

    with_head, without = slopes(found["aux"])
    kernel = lambda tree: np.asarray(tree["in"]["kernel"])  # noqa: E731
    assert np.abs(kernel(with_head) - kernel(without)).max() > 1e-5
    last = lambda tree: np.asarray(tree["raw_out"]["kernel"])  # noqa: E731
    np.testing.assert_allclose(last(with_head), last(without), rtol=1e-3, atol=1e-6)
    wrong = as_network(
        Discriminator(spec=spec, dtype="float32", features=9, width=8), spec
    )
    with pytest.raises(ValueError, match="discriminator.features: is 9.*has 8"):
        make(**{**fields, "networks": {**networks, "discriminator": wrong}})


@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_matched_student_stays_and_others_come_to_it_from_both_sides(gan_weight):
    objective = make(gan_weight=gan_weight)
    assert scores.slope(objective, C) == 0
    found = scores.flow(objective, [0.3 * C, 3 * C, -0.3 * C], rate=0.05)
    np.testing.assert_allclose(found, [C, C, -C], atol=2e-3)


def test_student_phase_moves_the_student_alone():
    objective, found = make(gan_weight=1.0), scores.params(0.5)

    def value(own, rest):
        return objective.loss(own, scores.inputs(rest, size=8))[0]

    own = {"student": found["student"]}
    moved, frozen = jax.grad(value, (0, 1))(own, found)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert np.any(moved["student"]["a"])
    assert objective.phases["student"].trains == ("student",)


def test_score_network_takes_five_steps_for_each_of_the_student():
    objective = make(aux_steps=5)
    phases = [objective.phase(step) for step in range(12)]
    assert phases == (["aux"] * 5 + ["student"]) * 2


def test_four_steps_are_at_the_times_of_the_paper_and_draw_fresh_noise():
    objective = make(num_steps=4, first_logsnr=-25.0)
    # 999, 749, 499 and 249 of 1000 steps.
    np.testing.assert_allclose(
        generator.times(objective), [1, 0.75, 0.5, 0.25, 0], atol=1e-3
    )
    z = jnp.ones((3, 2))
    predict = lambda z, t: Prediction(0.5 * z, z)  # noqa: E731

    def draw(num_steps, seed):
        sampler = Consistency(num_steps=num_steps)
        times = sampler.times(scores.PROCESS.schedule)
        keys = jax.random.split(jax.random.key(seed), 3)
        state = solve(sampler, scores.PROCESS, predict, z, times, keys)
        return np.asarray(sampler.final(state))

    np.testing.assert_array_equal(draw(1, 0), draw(1, 1))
    np.testing.assert_array_equal(draw(4, 0), draw(4, 0))
    assert np.abs(draw(4, 0) - draw(4, 1)).min() > 0


@pytest.mark.parametrize("phase", ["aux", "student"])
@pytest.mark.parametrize(
    "fields", [dict(num_steps=3), dict(gan_weight=0.0, guidance_scale=2.0)], ids=str
)
def test_cost_of_a_step(phase, fields):
    found, said = scores.evaluations(DistributionMatching2, phase, **fields)
    np.testing.assert_allclose(found, said, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(gan_weight=-1.0), "gan_weight"),
        (dict(discriminator_weight=-1.0), "discriminator_weight"),
        (dict(min_t=0.9, max_t=0.1), "min_t"),
        (dict(teacher=None), "config.teacher"),
    ],
)
def test_what_does_not_fit_is_named(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        make(**fields)
