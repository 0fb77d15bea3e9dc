import dataclasses
import re
from types import SimpleNamespace

import pytest

from diffusionlab import checks, experiment, inference, sharding, types
from diffusionlab import config as config_lib
from diffusionlab.processes.categorical import Categorical
from diffusionlab.schedules import alpha
from diffusionlab.settings import Optimizer


def changed(config, path, value):
    """A copy of a resolved config in which one key is set."""
    head, _, rest = path.partition(".")
    new = changed(config.get(head, {}), rest, value) if rest else value
    return {**config, head: new}


def test_build_makes_every_object_of_the_config(smoke):
    config = smoke("mixture")
    built = experiment.build(config)
    assert built.seed == config["seed"] == 0
    assert built.train_source.split == "train" and built.test_source.split == "test"
    assert built.spec.shape == (2,) and built.spec.num_classes == 8
    assert isinstance(built.optim["denoiser"], Optimizer)
    assert built.objective.networks is built.networks or (
        built.objective.networks == built.networks
    )
    assert set(built.ema) == set(config["ema"])
    assert set(built.evals) == set(config["evals"])


def test_held_out_data_are_not_trained_on(smoke):
    config = smoke("digits")
    config["data"]["source"]["split"] = "test"
    with pytest.raises(ValueError, match="data.source.split: 'test' would be trained"):
        experiment.build(config)


def test_transforms_come_in_the_order_of_the_registry(smoke):
    config = smoke("digits")
    blocks = {"clip_x": {}, "classifier_free": {"guidance_scale": 1.0}}
    guide = experiment.build({**config, "guidance": blocks}).guide
    assert [type(g).__name__ for g in guide] == ["ClassifierFree", "ClipX"]


def test_optimiser_for_a_role_that_is_not_there_is_an_error(smoke):
    config = smoke("mixture")
    config["optim"]["teacher"] = config["optim"]["denoiser"]
    said = "config.optim: has blocks for ['denoiser', 'teacher'], but the objective "
    with pytest.raises(ValueError, match=re.escape(said + "trains ['denoiser']")):
        experiment.build(config)


def test_role_without_an_optimiser_is_an_error(smoke):
    config = smoke("mixture")
    config["optim"] = {}
    with pytest.raises(ValueError, match=r"config\.optim: has blocks for \[\], but"):
        experiment.build(config)


def test_network_that_no_role_uses_is_an_error(smoke):
    config = smoke("mixture")
    config["networks"]["spare"] = config["networks"]["denoiser"]
    with pytest.raises(ValueError, match="config.networks.spare: no role .* used: den"):
        experiment.build(config)


def test_network_that_is_not_there_is_an_error(smoke):
    config = smoke("mixture")
    config["networks"] = {"denoizer": config["networks"]["denoiser"]}
    with pytest.raises(
        ValueError, match="needs a network 'denoiser'; there are: denoi"
    ):
        experiment.build(config)


def test_average_that_a_role_keeps_must_be_there(smoke):
    built = experiment.build(smoke("mixture"))
    role = built.objective.roles["denoiser"]._replace(ema=("long",))

    class Objective:
        roles = {"denoiser": role}

    with pytest.raises(ValueError, match="config.ema.long: missing; role 'denoiser'"):
        checks.check(dataclasses.replace(built, objective=Objective))


def test_micro_batches_must_divide_the_batch(smoke):
    config = smoke("mixture", "train.micro_batches=3")
    with pytest.raises(ValueError, match=r"micro_batches: 3 does not divide.*\(16\)"):
        experiment.build(config)


def test_guidance_without_classes_is_an_error(smoke):
    source = "{'name': 'generated', 'shape': (4, 4, 1), 'num_classes': 0}"
    config = smoke("digits", f"data.source={source}", "evals={}")
    experiment.build(config)
    config = changed(config, "guidance.classifier_free.guidance_scale", 2.0)
    with pytest.raises(
        ValueError, match=r"config\.guidance: guidance_scale: 2.0 needs"
    ):
        experiment.build(config)


def test_rule_for_an_unknown_logical_axis_is_an_error(smoke):
    config = changed(smoke("mixture"), "mesh.rules", {"embd": "fsdp"})
    with pytest.raises(ValueError, match="rules.embd: .*; did you mean 'embed'"):
        experiment.build(config)


def test_error_of_an_object_has_the_path_of_its_block(smoke):
    config = smoke("digits", "networks.denoiser.patch_size=3")
    with pytest.raises(ValueError, match=r"config\.networks\.denoiser\.patch_size: 3 "):
        experiment.build(config)


def test_evaluator_for_other_data_is_refused_when_building(smoke):
    config = smoke("digits", "evals={'exact': {'name': 'mixture'}}")
    with pytest.raises(ValueError, match="config.evals.exact.name: the evaluator"):
        experiment.build(config)


@pytest.mark.parametrize("name", ["elbo", "text_quality"])
def test_evaluator_that_draws_is_refused_for_what_has_nothing_to_draw(root, name):
    config = config_lib.load(f"{root}/configs/text/language_model.py:smoke")
    config.checkpoint.best, config.evals = "", {"held": {"name": name}}
    with pytest.raises(ValueError, match="config.evals.held: .* makes none; take 'de"):
        experiment.build(config_lib.resolve(config))


UNSTABLE = {"name": "runge_kutta_4", "num_steps": 2}
STABLE = {"name": "ddim", "num_steps": 2}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            {"name": "inpainting", "sampler": UNSTABLE},
            r"config\.evals\.x\.sampler\.num_steps: 2 steps on this grid are unstable",
        ),
        (
            {
                "name": "inversion",
                "num_steps": (64, 2),
                "sampler": {**UNSTABLE, "num_steps": 64},
            },
            r"config\.evals\.x\.sampler\.num_steps: 2 steps on this grid are unstable",
        ),
    ],
)
def test_sampler_of_an_evaluator_is_checked_as_it_will_run(smoke, block, said):
    config = smoke("mixture", "evals={}")
    config["evals"] = {"x": block}
    with pytest.raises(ValueError, match=said):
        experiment.build(config_lib.resolve(config))


def test_adaptive_samplers_are_refused_under_noise_of_the_guidance(smoke):
    config = smoke("mixture", "guidance={'cads': {'noise_scale': 0.0}}", "evals={}")
    config["sampler"] = {"name": "probability_flow"}
    built = experiment.build(config_lib.resolve(config))
    config = changed(config, "guidance.cads.noise_scale", 0.1)
    said = "config.guidance.cads: draws fresh noise at every time, and "
    with pytest.raises(ValueError, match=f"{said}config.sampler chooses"):
        experiment.build(config)
    adaptive, config = config["sampler"], {**config, "sampler": STABLE}
    experiment.build(config)
    config["evals"] = {"x": {"name": "inpainting", "sampler": adaptive}}
    with pytest.raises(ValueError, match=f"{said}config.evals.x.sampler chooses"):
        experiment.build(config)
    # An evaluator with samplers of its own comes with one later.
    config["evals"] = {}
    noisy = experiment.build(config)
    with pytest.raises(ValueError, match=f"{said}the sampler Probability"):
        inference.make_draw(noisy, sharding.make_mesh(noisy.mesh), built.sampler)


def test_likelihood_without_labels_needs_a_trained_null_class(smoke):
    config = smoke("mixture", "objective.label_dropout=0", "guidance={}")
    config["evals"] = {"bits": {"name": "likelihood", "conditional": False}}
    with pytest.raises(ValueError, match=r"config\.evals\.bits: needs a prediction wi"):
        experiment.build(config)
    experiment.build(changed(config, "objective.label_dropout", 0.1))


def test_end_of_the_bound_is_compared_with_the_schedule(smoke):
    evals = {"bits": {"name": "likelihood", "logsnr_max": -40.0}}
    with pytest.raises(
        ValueError, match=r"config\.evals\.bits\.logsnr_max: must be ab"
    ):
        experiment.build(smoke("mixture", f"evals={evals}"))


def test_guidance_without_a_trained_null_class_is_refused(smoke):
    config = smoke(
        "digits",
        "objective.label_dropout=0",
        "guidance.classifier_free.guidance_scale=3",
    )
    with pytest.raises(ValueError, match="label_dropout=0 never trains"):
        experiment.build(config)


def test_a_sampler_without_its_parts_is_named(smoke):
    class Half:
        num_evaluations = 1

        def step(self):
            pass

    message = (
        r"^config\.sampler\.name: Half is no sampler, it has no times, init, final"
    )
    with pytest.raises(ValueError, match=message):
        checks.check_sampler(Half(), None, "config.sampler")


def test_tokens_made_in_other_blocks_are_another_process():
    spec = types.DataSpec((4,), num_tokens=3)
    one, other = (
        Categorical(spec=spec, schedule=alpha.Linear(), block_length=length)
        for length in (0, 2)
    )
    there = SimpleNamespace(process=other, spec=spec)
    experiment.check_same(there, other, spec, "config.teacher")
    with pytest.raises(ValueError, match="another process.block_length: 2 there, 0 h"):
        experiment.check_same(there, one, spec, "config.teacher")


def test_a_noise_input_that_nothing_feeds_is_an_error():
    config = config_lib.load("configs/text/masked.py:smoke")
    config.networks.denoiser.noise_input = 2
    with pytest.raises(ValueError, match="denoiser.noise_input: 2, but this objective"):
        experiment.build(config_lib.resolve(config))
