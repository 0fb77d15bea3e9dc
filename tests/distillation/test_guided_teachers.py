"""Students of a teacher that is told a number: so are all networks of the same kind."""

import jax
import jax.numpy as jnp
import known_scores as scores
import numpy as np
import pytest

from diffusionlab.distillation import base
from diffusionlab.distillation.boot import TARGET, Boot
from diffusionlab.distillation.diff_instruct import DiffInstruct
from diffusionlab.distillation.distribution_matching import DistributionMatching
from diffusionlab.distillation.distribution_matching_2 import DistributionMatching2
from diffusionlab.distillation.em_distillation import EmDistillation
from diffusionlab.distillation.f_divergence import FDivergence
from diffusionlab.distillation.reflow import Reflow
from diffusionlab.distillation.score_identity import ScoreIdentity
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.types import DataSpec, Network

SCALE = "guidance_scale"
TEACHER = scores.TEACHER._replace(cond={SCALE: 3.0})
GENERATORS = [
    DiffInstruct,
    EmDistillation,
    DistributionMatching,
    DistributionMatching2,
    FDivergence,
    ScoreIdentity,
]


def told(*names):
    """A denoiser that cannot answer without these numbers."""
    net = scores.denoiser()

    def shifted(z, cond):
        return z + sum(cond[name][:, None] for name in names)

    def apply(params, z, cond, *, train=False, key=None):
        return net.apply(params, shifted(z, cond), cond)

    def features(params, z, cond):
        return apply(params, z, cond), z

    return Network(net.init, apply, (), features)


def networks(*names):
    return {"denoiser": told(*names), "discriminator": scores.head()}


def check_phases(objective):
    """Traces every phase."""
    found = scores.params(0.5)
    for phase in objective.phases.values():
        own = {role: found[role] for role in phase.trains}
        value, _ = jax.eval_shape(
            lambda own, phase=phase: phase.loss(own, scores.inputs(found, size=4)), own
        )
        assert value.shape == ()


@pytest.mark.parametrize("method", GENERATORS, ids=lambda method: method.__name__)
def test_a_generator_is_told_what_its_teacher_was(method):
    fields = {"regression_weight": 0.0} if method is DistributionMatching else {}
    fields |= dict(networks=networks(SCALE), teacher=TEACHER, num_steps=2)
    check_phases(scores.make(method, **fields))


def make(method, **fields):
    spec = DataSpec((scores.SIZE,))
    given = dict(process=scores.PROCESS, spec=spec, teacher=TEACHER)
    return method(**given, **fields)


@pytest.mark.parametrize("mode", ["reflow", "distil"])
def test_reflow_is_told_what_its_teacher_was(mode):
    sampler = Ddim(num_steps=4)
    check_phases(make(Reflow, mode=mode, sampler=sampler, networks=networks(SCALE)))


def test_a_student_with_a_number_of_its_own_is_told_both():
    check_phases(make(Boot, networks=networks(SCALE, TARGET)))
    with pytest.raises(ValueError, match="this student is told 'target_logsnr'"):
        make(Boot, networks=networks(SCALE))


def test_what_is_said_comes_before_what_the_teacher_was_told():
    objective, t = make(Boot, networks=networks(SCALE, TARGET)), jnp.float32([0.2, 0.5])
    found = base.conditions(objective, t, {"label": jnp.int32([0, 1])})
    assert set(found) == {"t", "logsnr", "start_logsnr", "label", SCALE}
    np.testing.assert_array_equal(found[SCALE], [3.0, 3.0])
    np.testing.assert_array_equal(found["t"], t)
    np.testing.assert_allclose(found["logsnr"], scores.PROCESS.schedule.logsnr(t))
    own = base.conditions(objective, t, {SCALE: jnp.ones(2)})
    np.testing.assert_array_equal(own[SCALE], [1.0, 1.0])
