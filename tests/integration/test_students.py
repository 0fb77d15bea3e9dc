"""Every method of distillation, in its smoke variant: from a teacher's directory on."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from diffusionlab import experiment, main, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
METHODS = sorted(
    path.stem
    for path in ROOT.glob("configs/distillation/*.py")
    if path.name != "__init__.py"
)


# method -> overrides, and the step before which the student changes what it does.
CHANGES = {
    "progressive": (("objective.steps_per_round=3",), 3),
    "em_distillation": (("objective.langevin_schedule=((0, 0), (3, 2))",), 3),
}
# Their networks take a while to compile.
SLOW = (
    "discrete_moment_matching",
    "distribution_matching_2",
    "f_divergence",
    "self_distillation_through_time",
)
BARE = ("evals={}", "logging.samples_every=0", "logging.tensorboard=False")


@pytest.mark.slow
@pytest.mark.parametrize("method", CHANGES)
def test_a_restart_where_a_method_changes_leaves_no_trace(
    method, student, contents, same, tmp_path, monkeypatch
):
    overrides, step = CHANGES[method]
    config = student(method, *BARE, *overrides, "train.num_steps=4")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.train(config, whole) == train.DONE
    with monkeypatch.context() as patch:
        patch.setattr(train.Preemption, "reached", lambda self, now: now == step)
        assert train.train(config, broken) == train.PREEMPTED
    assert train.train(config, broken) == train.DONE
    assert same(contents(config, whole, 4), contents(config, broken, 4))
    objective = experiment.build(config).objective
    if hasattr(objective, "transition"):
        assert objective.transition(step) == "halve"
    else:
        # Odd steps are the student's.
        before, after = (objective.phase(now) for now in (step - 2, step))
        assert (before, after) == ("student_0", "student_2")


def _param(method):
    return pytest.param(method, marks=[pytest.mark.slow] if method in SLOW else [])


@pytest.mark.parametrize("method", map(_param, METHODS))
def test_a_method_trains_resumes_samples_and_evaluates(
    method, student, teacher_of, contents, same, rows, tmp_path, capsys
):
    whole, broken, moved = (tmp_path / name for name in ("whole", "broken", "moved"))
    shutil.copytree(teacher_of(method), moved)
    words = [f"--config={ROOT}/configs/distillation/{method}.py:smoke"]
    words += [f"--workdir={whole}", f"--config.teacher={moved}"]
    assert main.run([*words, *(f"--config.{word}" for word in BARE)]) == train.DONE
    # A student goes on whatever becomes of its teacher's directory, here from what a
    # machine leaves that is lost between the two saves.
    shutil.rmtree(moved)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "10")
    (broken / "result.json").unlink()
    evals = {"variance": {"name": "sample_variance", "num_samples": 40}}
    more = [f"--workdir={broken}", f"--config.evals={evals}"]
    assert main.run([*more, "--config.logging.samples_every=5"]) == train.DONE
    assert "resumed from step 5" in capsys.readouterr().out
    config = student(method, *BARE)
    assert same(contents(config, whole, 10), contents(config, broken, 10))
    losses = [r["train/loss"] for r in rows(broken) if "train/loss" in r]
    assert losses and np.all(np.isfinite(losses))
    drawing = [f"--workdir={broken}", "--mode=sample", "--num_samples=8"]
    assert main.run([*drawing, "--batch_size=24"]) == 0
    (job,) = (p for p in (broken / "samples").iterdir() if p.is_dir())
    assert np.all(np.isfinite(np.load(job / "samples.npz")["x"]))
    numbers = json.loads((broken / "result.json").read_text())["numbers"]
    assert numbers and all(np.isfinite(v) for v in numbers.values())
