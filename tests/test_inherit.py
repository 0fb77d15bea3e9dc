"""What a config takes from the run of its teacher."""

import json
import pathlib
import shutil

import ml_collections
import pytest

from diffusionlab import config as config_lib
from diffusionlab import inherit, main, workdir

METHOD = "multistep_consistency"
FILE = "configs/distillation/multistep_consistency.py:smoke"


def test_process_data_and_network_are_the_teachers(student, teacher_run):
    config, stored = student(METHOD), workdir.read_config(teacher_run)
    assert config["process"] == stored["process"]
    assert config["data"]["source"] == stored["data"]["source"]
    assert config["networks"] == stored["networks"]
    assert config["teacher"]["run"] == str(teacher_run)
    assert config["teacher"]["config"] == config_lib.completed(stored)
    assert config_lib.resolve(config) == config


def test_a_block_without_a_name_says_what_differs(student, teacher_run):
    config = student(METHOD, "networks={'denoiser': {'conditions': ('s',)}}")
    theirs = workdir.read_config(teacher_run)["networks"]["denoiser"]
    assert config["networks"]["denoiser"] == {**theirs, "conditions": ["s"]}
    other = "networks={'denoiser': {'name': 'gaussian_mixture'}}"
    assert student(METHOD, other)["networks"]["denoiser"]["name"] == "gaussian_mixture"


def test_conditions_come_after_those_of_the_network(student, smoke, tmp_path):
    config = smoke("mixture")
    config["networks"]["denoiser"]["conditions"] = ["guidance_scale"]
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    more = "networks={'denoiser': {'conditions': ('target_logsnr', 'guidance_scale')}}"
    found = student(METHOD, f"teacher.start='{tmp_path}'", more)
    known = ["guidance_scale", "target_logsnr"]
    assert found["networks"]["denoiser"]["conditions"] == known


def test_a_key_inside_of_what_is_inherited_can_be_set(student):
    words = ["networks.denoiser.width=64", "process.prediction=x"]
    found = student("boot", *words, "data.source.num_components=5")
    plain = student("boot")
    assert found["networks"]["denoiser"] == {
        **plain["networks"]["denoiser"],
        "width": 64,
    }
    assert found["process"] == {**plain["process"], "prediction": "x"}
    source = {**plain["data"]["source"], "num_components": 5}
    assert found["data"]["source"] == source
    with pytest.raises(ValueError, match="config.proces: there is no such block"):
        student("boot", "proces.prediction=x")


@pytest.mark.parametrize("start", [False, True])
def test_a_run_goes_on_by_its_config_file_when_the_teacher_has_gone(
    start, student, teacher_run, root, tmp_path
):
    gone, run = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(teacher_run, gone)
    overrides = [f"teacher={gone}", "networks={'denoiser': {'conditions': ('s',)}}"]
    overrides += [f"teacher.start='{gone}'"] if start else []
    config = student(METHOD, *overrides)
    workdir.claim(run, config, {}, {})
    shutil.rmtree(gone)
    words = [f"--config={root}/{FILE}", f"--workdir={run}"]
    args = main.parser().parse_args(words)
    assert main._load(args, overrides) == config
    other = [f"teacher={tmp_path / 'other'}"]
    with pytest.raises(FileNotFoundError, match="other' holds no run"):
        main._load(args, other)


def test_the_network_is_that_of_the_start(student, smoke, tmp_path):
    config = smoke("mixture", "networks.denoiser.width=32")
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = student(METHOD, f"teacher.start='{tmp_path}'")
    assert found["networks"]["denoiser"]["width"] == 32
    assert found["teacher"]["config"]["networks"]["denoiser"]["width"] == 16


def test_one_number_of_steps_sets_objective_and_sampler(root):
    config = config_lib.load(f"{root}/{FILE}")
    config_lib.override(config, ["objective.num_steps=3"])
    assert config.sampler.num_steps == 3


def test_the_short_form_sets_the_run_of_any_config(root, smoke):
    config = config_lib.load(f"{root}/configs/mixture/denoising.py:smoke")
    config_lib.override(config, ["teacher=runs/teacher"])
    assert config.teacher.run == "runs/teacher"
    assert smoke("mixture")["teacher"]["run"] == ""


def test_a_config_without_a_teacher_stays_as_it_is():
    config = ml_collections.ConfigDict({"process": {"name": "gaussian"}})
    inherit.inherit(config)
    assert config.to_dict() == {"process": {"name": "gaussian"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "config.teacher: missing; give the directory of a trained run"),
        (
            ("teacher=nowhere",),
            r"config.teacher.run: 'nowhere' holds no run \(there is no config.json\)",
        ),
        (("teacher={here}",), "config.teacher.run: .* has no checkpoint yet"),
        (
            ("teacher={there}", "teacher.start='nowhere'"),
            "config.teacher.start: 'nowhere' holds no run",
        ),
        (
            ("teacher.config={'seed': 1}",),
            "config.teacher: missing; give the directory",
        ),
    ],
)
def test_a_teacher_that_is_not_there_is_one_line(
    overrides, message, root, teacher_run, tmp_path
):
    (tmp_path / "config.json").write_text("{}")
    config = config_lib.load(f"{root}/{FILE}")
    names = {"here": tmp_path, "there": teacher_run}
    words = [word if "{'" in word else word.format(**names) for word in overrides]
    config_lib.override(config, words)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        inherit.inherit(config)


def test_a_start_without_such_a_network_is_refused(student, smoke, tmp_path):
    config = smoke("mixture")
    config["networks"] = {"other": config["networks"]["denoiser"]}
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no network 'denoiser' to start from"):
        student(METHOD, f"teacher.start='{tmp_path}'")


def test_a_teachers_config_without_a_run_is_refused(smoke):
    config = smoke("mixture")
    config["teacher"]["config"] = {"seed": 1}
    with pytest.raises(ValueError, match="config.teacher.config.seed: is of the"):
        config_lib.resolve(config)


def test_an_objective_without_a_teacher_refuses_one(root, teacher_run, tmp_path):
    file = f"--config={root}/configs/mixture/denoising.py:smoke"
    words = [file, f"--config.teacher={teacher_run}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="objective 'denoising' has no teacher"):
        main.run(words)
    assert not pathlib.Path(tmp_path / "run").exists()


def test_a_teacher_that_has_become_another_is_refused(student, teacher_run, tmp_path):
    config = student(METHOD)
    workdir.claim(tmp_path, config, {}, {})
    other = json.loads(json.dumps(config))
    other["teacher"]["config"]["networks"]["denoiser"]["width"] = 32
    with pytest.raises(
        workdir.WorkdirError, match=r"teacher\.config\.networks\.denoiser\.width: 16"
    ):
        workdir.check(tmp_path, other, "auto")
    other = json.loads(json.dumps(config))
    # It may have gone on, or draw with another sampler: that is not what is distilled.
    other["teacher"]["config"]["train"]["num_steps"] = 20
    other["teacher"]["config"]["sampler"]["num_steps"] = 7
    workdir.check(tmp_path, other, "auto")
