"""The teacher's parameters: from its run, in the student's own copy, as a start."""

import dataclasses
import json
import shutil

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


def test_an_optimiser_without_second_moments_is_refused(
    built, mesh, tmp_path, monkeypatch
):
    block = dataclasses.replace(built.teacher.optim["denoiser"], name="sgd", options={})
    sgd = dataclasses.replace(built.teacher, optim={"denoiser": block})
    asking = dataclasses.replace(asking_for_moments(built), teacher=sgd)
    monkeypatch.setattr(teachers, "_params", lambda *_: {})
    with pytest.raises(ValueError, match="was not trained by Adam.*by 'sgd'"):
        teachers.load(asking, mesh, tmp_path)


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


def test_a_student_is_not_guided_itself(student):
    guided = "guidance={'classifier_free': {'guidance_scale': 2.0}}"
    with pytest.raises(ValueError, match="a student does not learn; guide its teacher"):
        experiment_lib.build(student(METHOD, guided))


def test_a_student_starts_at_the_teacher(built, mesh, average):
    start = teachers.starting(built, mesh)
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
    assert teachers.starting(built, mesh) is None
    built = experiment_lib.build(student(METHOD, f"teacher.start='{teacher_run}'"))
    equal(teachers.starting(built, mesh), average["denoiser"])


def test_another_network_cannot_be_the_start(student, mesh):
    other = "networks={'denoiser': {'width': 8}}"
    built = experiment_lib.build(student(METHOD, other))
    start = teachers.starting(built, mesh)
    with pytest.raises(
        ValueError, match="config.teacher.start: the network .* another"
    ):
        state_lib.create(built, start)


def test_a_start_that_predicts_something_else_is_refused(
    student, mesh, teacher_run, tmp_path
):
    shutil.copytree(teacher_run, tmp_path / "run")
    config = workdir.read_config(tmp_path / "run")
    config["process"]["prediction"] = "eps"
    workdir.write_json(tmp_path / "run" / "config.json", config)
    built = experiment_lib.build(student(METHOD, f"teacher.start='{tmp_path / 'run'}'"))
    with pytest.raises(
        ValueError, match="has another process.prediction: eps there, v"
    ):
        teachers.starting(built, mesh)


def test_a_tree_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(workdir.WorkdirError, match="cannot be written"):
        stored_tree.write(tmp_path / "file" / "params", {"a": np.zeros(3)})
