"""Learning rates as an argument of the step: the program is the same for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import compiled, optim, registry, sharding
from diffusionlab import experiment as experiment_lib
from diffusionlab.settings import Optimizer

PATH = "config.optim.denoiser"
SCHEDULES = [
    dict(name="constant", value=0.3, warmup_steps=2),
    dict(name="cosine", value=0.3, decay_steps=6, warmup_steps=2, final_value=0.1),
    dict(name="linear", value=0.3, decay_steps=6, final_value=0.1),
    dict(name="inverse_sqrt", value=0.3, warmup_steps=2),
]


def settings(name="adam", rate=SCHEDULES[0]):
    return Optimizer(name=name, learning_rate=rate, clip_norm=0.0)


def test_every_schedule_is_here():
    assert {rate["name"] for rate in SCHEDULES} == set(registry.table("learning_rate"))


@pytest.mark.parametrize("rate", SCHEDULES, ids=lambda rate: rate["name"])
def test_a_schedule_is_in_proportion_to_its_value(rate):
    block = settings(rate=rate)
    peak = optim.peaks({"denoiser": block})["denoiser"]
    schedule = optim.learning_rate(block, PATH)
    twice = optim.learning_rate(block, PATH, 2 * peak)
    for count in map(jnp.asarray, range(8)):
        np.testing.assert_allclose(twice(count), 2 * schedule(count), rtol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_known_optimiser_takes_it(name):
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    block = settings(name)

    @jax.jit
    def moved(peak):
        optimizer = optim.make(block, params, PATH, peak)
        return optimizer.update(params, optimizer.init(params), params)[0]

    given = moved(optim.peaks({"denoiser": block})["denoiser"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), given, moved(None)
    )


def test_an_optimiser_or_schedule_of_the_users_has_a_number():
    own = settings(rate=dict(name="mine:schedule", value=1.0))
    assert not optim.peaks({"a": settings("optax:yogi"), "b": own})


def test_the_program_does_not_depend_on_the_rate(smoke):
    texts = set()
    for value in (0.01, 0.02):
        config = smoke("mixture", f"optim.denoiser.learning_rate.value={value}")
        experiment = experiment_lib.build(config)
        mesh = sharding.make_mesh(experiment.mesh)
        with jax.set_mesh(mesh):
            steps = compiled.Steps(experiment, mesh)
            ((name, function),) = steps._functions.items()
            gathered = steps.abstract_gathered()[name]
            given = (steps.state, gathered, steps.batch, steps.frozen, steps._peaks)
            texts.add(function.lower(*given).as_text())
    assert len(texts) == 1
