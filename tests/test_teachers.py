"""The teacher's parameters: from its run, in the student's own copy, as a start."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

from diffusionlab import (
    compiled,
    inference,
    restore,
    sharding,
    stored_tree,
    teachers,
    train,
    workdir,
)
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints

METHOD = "multistep_consistency"


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def built(student):
    return experiment_lib.build(student(METHOD))


@pytest.fixture(scope="module")
def mesh(built):
    return sharding.make_mesh(built.mesh)


@pytest.fixture(scope="module")
def average(built, mesh, teacher_run):
    """What the teacher samples with: its average, restored on its own."""
    checkpoints = Checkpoints(teacher_run)
    return restore.restore(built.teacher, checkpoints, 10, "main", mesh)


def asking_for_moments(built):
    class Objective:
        needs_second_moment = True
        roles = built.objective.roles

    return dataclasses.replace(built, objective=Objective())


def test_a_teacher_is_its_average_where_the_abstract_one_says(
    built, mesh, average, tmp_path
):
    found = teachers.load(built, mesh, tmp_path)
    equal(found, {"teacher": average})
    said = teachers.abstract(built, mesh)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), found) == (
        jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), said)
    )


def test_a_run_keeps_its_own_copy(built, mesh, tmp_path, monkeypatch):
    found = teachers.load(built, mesh, tmp_path)
    teachers.keep(built, found, tmp_path)
    about = json.loads((tmp_path / "teacher" / "about.json").read_text())
    assert about["step"] == 10 and about["ema"] == "main"
    assert about["digest"] == inference.digest(found)
    monkeypatch.setattr(teachers, "_run", None)  # its directory is not looked at
    equal(teachers.load(built, mesh, tmp_path), found)
    teachers.keep(built, found, tmp_path)


def test_a_copy_that_was_never_finished_is_made_again(built, mesh, tmp_path):
    found = teachers.load(built, mesh, tmp_path)
    (tmp_path / "teacher" / "params").mkdir(parents=True)
    teachers.keep(built, found, tmp_path)
    equal(teachers.load(built, mesh, tmp_path), found)


def test_a_damaged_copy_is_named(built, mesh, tmp_path):
    teachers.keep(built, teachers.load(built, mesh, tmp_path), tmp_path)
    about = tmp_path / "teacher" / "about.json"
    record = json.loads(about.read_text())
    about.write_text(json.dumps({**record, "digest": "0"}))
    with pytest.raises(workdir.WorkdirError, match="are not those of the teacher"):
        teachers.load(built, mesh, tmp_path)
    shutil.rmtree(tmp_path / "teacher" / "params")
    with pytest.raises(workdir.WorkdirError, match="cannot be read"):
        teachers.load(built, mesh, tmp_path)


def test_second_moments_come_with_the_raw_parameters(
    built, mesh, tmp_path, teacher_run
):
    found = teachers.load(asking_for_moments(built), mesh, tmp_path)
    whole, *_ = Checkpoints(teacher_run).restore(
        10,
        state_lib.abstract(built.teacher, mesh),
        compiled.Steps(built.teacher, mesh).abstract_gathered(),
    )
    equal(found["teacher"], dict(whole.params))
    # clip, adam: (mu, nu, count) of the second.
    adam = whole.opt_state["denoiser"][1][0]
    equal(found["second_moment"], {"denoiser": adam.nu})
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(adam.nu))


def test_a_student_starts_at_the_average_where_its_teacher_is_raw(
    built, mesh, average, student, tmp_path
):
    asking = asking_for_moments(built)
    found = teachers.starting(asking, mesh, {"teacher": {}}, tmp_path)
    equal(found, average["denoiser"])
    plain = experiment_lib.build(student(METHOD, "teacher.ema='none'"))
    frozen = teachers.load(asking_for_moments(plain), mesh, tmp_path)
    found = teachers.starting(asking_for_moments(plain), mesh, frozen, tmp_path)
    equal(found, frozen["teacher"]["denoiser"])


def test_second_moments_of_an_average_are_refused(mesh, student, tmp_path):
    built = experiment_lib.build(student(METHOD, "teacher.ema='main'"))
    with pytest.raises(ValueError, match="config.teacher.ema: is 'main', but the sec"):
        teachers.load(asking_for_moments(built), mesh, tmp_path)


# Those of adamax are a maximum; those of rmsprop have no correction of their bias.
@pytest.mark.parametrize("name", ["sgd", "adamax", "rmsprop"])
def test_an_optimiser_without_second_moments_is_refused(
    name, built, mesh, tmp_path, monkeypatch
):
    block = dataclasses.replace(built.teacher.optim["denoiser"], name=name, options={})
    other = dataclasses.replace(built.teacher, optim={"denoiser": block})
    asking = dataclasses.replace(asking_for_moments(built), teacher=other)
    monkeypatch.setattr(teachers, "_params", lambda *_: {})
    with pytest.raises(ValueError, match=f"was not trained by Adam.*by '{name}'"):
        teachers.load(asking, mesh, tmp_path)


def test_a_teacher_that_was_never_trained_has_no_second_moments(
    built, mesh, tmp_path, monkeypatch
):
    def zeros(self, step, part):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), part)

    monkeypatch.setattr(Checkpoints, "restore_part", zeros)
    with pytest.raises(
        ValueError,
        match="was never trained: .* step 10 has no second moments.*identity",
    ):
        teachers.load(asking_for_moments(built), mesh, tmp_path)


def test_a_run_that_has_lost_its_copy_is_refused(built, mesh, tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(workdir.WorkdirError, match="its copy of the teacher is gone"):
        teachers.load(built, mesh, tmp_path)


def test_the_step_is_chosen_once_for_a_start(
    student, mesh, average, teacher_run, tmp_path
):
    run, folder = tmp_path / "teacher_run", tmp_path / "student"
    shutil.copytree(teacher_run, run)
    config = student(METHOD, f"teacher={run}")
    built = asking_for_moments(experiment_lib.build(config))
    frozen = teachers.load(built, mesh, folder)
    # The teacher goes on meanwhile; what is here of this checkpoint is only its name.
    (run / "checkpoints" / "20").mkdir()
    equal(teachers.starting(built, mesh, frozen, folder), average["denoiser"])
    teachers.keep(built, frozen, folder)
    assert json.loads((folder / "teacher" / "about.json").read_text())["step"] == 10
    # Another start before the first checkpoint: the average of the copy's own step.
    again = asking_for_moments(experiment_lib.build(config))
    kept = teachers.load(again, mesh, folder)
    equal(teachers.starting(again, mesh, kept, folder), average["denoiser"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("teacher.step=3",), "config.teacher.step: no checkpoint of step 3"),
        (("teacher.ema='longer'",), "config.teacher.ema: .*longer"),
    ],
)
def test_a_step_or_an_average_that_is_not_there_is_refused(
    overrides, message, student, mesh, tmp_path
):
    with pytest.raises(ValueError, match=message):
        built = experiment_lib.build(student(METHOD, *overrides))
        teachers.load(built, mesh, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "process.schedule",
            {"name": "sigmoid"},
            "has another process.schedule: Cosine",
        ),
        ("data.source.dimension", 3, r"has another shape of the data: \(2,\) there"),
        ("data.source.num_components", 5, "has another number of classes: 8 there, 5"),
    ],
)
def test_a_teacher_of_something_else_is_refused(key, value, message, student):
    config = student(METHOD)
    *parents, last = key.split(".")
    block = config
    for parent in parents:
        block = block[parent]
    block[last] = value
    with pytest.raises(ValueError, match=f"config.teacher: the run in .* {message}"):
        experiment_lib.build(config)


def test_a_student_with_noise_of_its_own_teaches_no_other(student, monkeypatch):
    of_config = experiment_lib._of_config

    def noisy(*arguments):
        made = of_config(*arguments)
        changed = types.SimpleNamespace(
            **{**vars(made.objective), "predict": None, "input_noise": "gaussian"}
        )
        return dataclasses.replace(made, objective=changed)

    monkeypatch.setattr(experiment_lib, "_of_config", noisy)
    with pytest.raises(ValueError, match="answers for one draw of its input_noise"):
        experiment_lib.build(student(METHOD))


def test_a_student_is_not_guided_itself(student):
    guided = "guidance={'classifier_free': {'guidance_scale': 2.0}}"
    with pytest.raises(ValueError, match="a student does not learn; guide its teacher"):
        experiment_lib.build(student(METHOD, guided))


def test_a_student_starts_at_the_teacher(built, mesh, average, tmp_path, monkeypatch):
    frozen = teachers.load(built, mesh, tmp_path)
    monkeypatch.setattr(teachers, "_run", None)  # its directory is not looked at again
    start = teachers.starting(built, mesh, frozen, tmp_path)
    equal(start, average["denoiser"])
    with jax.set_mesh(mesh):
        state = state_lib.init(built, mesh, start)
    equal(state.params["student"], average["denoiser"])
    equal(state.ema["main"]["student"], average["denoiser"])


def test_a_new_condition_starts_at_its_own(student, mesh, average):
    wide = "networks={'denoiser': {'conditions': ('s',)}}"
    built = experiment_lib.build(student(METHOD, wide))
    state = state_lib.create(built, average["denoiser"])
    params = state.params["student"]
    dense = params["embedding"].pop("condition_s")
    assert not np.any(dense["kernel"])
    equal(params, average["denoiser"])


def test_a_student_may_start_anew_or_elsewhere(student, mesh, teacher_run, average):
    built = experiment_lib.build(student(METHOD, "teacher.start='random'"))
    assert teachers.starting(built, mesh, {}, teacher_run) is None
    built = experiment_lib.build(student(METHOD, f"teacher.start='{teacher_run}'"))
    equal(teachers.starting(built, mesh, {}, teacher_run), average["denoiser"])


def test_another_network_cannot_be_the_start(student, mesh, tmp_path):
    other = "networks={'denoiser': {'width': 8}}"
    built = experiment_lib.build(student(METHOD, other))
    frozen = teachers.load(built, mesh, tmp_path)
    start = teachers.starting(built, mesh, frozen, tmp_path)
    with pytest.raises(
        ValueError, match="config.teacher.start: the network .* another"
    ):
        state_lib.create(built, start)


@pytest.mark.parametrize("start", ["", "another"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prediction", "'x'", "prediction: v there, x here"),
        ("scale_input", "True", "scale_input: False there, True here"),
        ("sigma_data", "0.5", "sigma_data: 1.0 there, 0.5 here"),
    ],
)
def test_a_network_that_means_something_else_is_no_start(
    start, key, value, message, student, mesh, teacher_run, tmp_path
):
    start = start and teacher_run
    other = [f"process.{key}={value}", f"teacher.start='{start}'"]
    built = experiment_lib.build(student(METHOD, *other))
    with pytest.raises(ValueError, match=f"has another process.{message}"):
        teachers.starting(built, mesh, {}, tmp_path)
    anew = student(METHOD, other[0], "teacher.start='random'")
    assert teachers.starting(experiment_lib.build(anew), mesh, {}, tmp_path) is None


def test_a_start_of_other_data_is_refused_before_networks_are_built(
    student, smoke, tmp_path
):
    images = tmp_path / "images"
    (images / "checkpoints" / "10").mkdir(parents=True)
    workdir.write_json(images / "config.json", smoke("digits"))
    config = student(METHOD, f"teacher.start='{images}'")
    with pytest.raises(
        ValueError, match=r"config.teacher.start: .* another shape of the data: \(8, 8"
    ):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_needs_its_teacher_says_so_once(built, mesh):
    loss = inference.make_loss(built, mesh)
    with pytest.raises(ValueError, match="^the loss of the objective 'multistep_con"):
        loss({}, {}, 0)


def test_a_tree_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(workdir.WorkdirError, match="cannot be written"):
        stored_tree.write(tmp_path / "file" / "params", {"a": np.zeros(3)})
