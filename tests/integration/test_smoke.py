"""Every config, in its smoke variant: trained, resumed, sampled, evaluated."""

import json
import pathlib

import numpy as np
import pytest

from diffusionlab import main, train

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("configs/*/*.py")
    # Students need a teacher: test_students.py.
    if path.name != "__init__.py" and path.parent.name != "distillation"
)
# Image networks take a while to trace and to compile for eight devices.
SLOW = ("imagenet64", "cifar10", "photos")


def _param(path):
    slow = any(name in path for name in SLOW)
    return pytest.param(path, marks=[pytest.mark.slow] if slow else [])


def test_the_configs_are_found():
    assert "configs/digits/denoising.py" in CONFIGS


@pytest.mark.parametrize("config", [_param(path) for path in CONFIGS])
def test_a_config_trains_resumes_samples_and_evaluates(
    config, root, rows, steps_of, tmp_path, capsys
):
    folder = tmp_path / "run"
    words = [f"--config={root / config}:smoke", f"--workdir={folder}"]
    assert main.run([*words, "--config.train.num_steps=5"]) == train.DONE
    assert json.loads((folder / "result.json").read_text())["step"] == 5
    assert main.run(words) == train.DONE
    said = capsys.readouterr().out
    assert "resumed from step 5" in said
    assert f"done; look at {folder / 'report.html'}" in said
    # A classifier has nothing to sample; its config says so.
    stored = json.loads((folder / "config.json").read_text())
    samples = stored["logging"]["samples_every"] > 0
    drawing = [f"--workdir={folder}", "--mode=sample", "--num_samples=8"]
    # As the pictures were drawn, 20 on eight devices: that is compiled already.
    drawing.append("--batch_size=24")
    if samples:
        assert main.run(drawing) == 0
    else:
        with pytest.raises(ValueError, match="nothing to sample"):
            main.run(drawing)
        assert not (folder / "samples").exists()
    assert main.run([f"--workdir={folder}", "--mode=eval", "--step=5"]) == 0

    result = json.loads((folder / "result.json").read_text())
    assert result["step"] == 10
    assert result["numbers"]
    assert all(np.isfinite(value) for value in result["numbers"].values())
    assert steps_of(folder) == [5, 10]
    losses = {r["step"]: r["train/loss"] for r in rows(folder) if "train/loss" in r}
    assert sorted(losses) == [2, 4, 5, 6, 8, 10]
    assert all(np.isfinite(loss) for loss in losses.values())
    for name in ("config.json", "overrides.json", "environment.json"):
        assert json.loads((folder / name).read_text())
    assert len(json.loads((folder / "overrides.json").read_text())) == 2
    assert list((folder / "tensorboard").glob("events.*"))
    labels = json.loads((folder / "config.json").read_text())["evals"]
    for step in (5, 10):
        for label in labels:
            assert (folder / "evals" / f"step_{step:08d}_{label}.json").is_file()
    report = (folder / "report.html").read_text()
    # Curves are drawn by the page itself, pictures are in it.
    is_text = stored["data"]["source"]["name"] == "text"
    assert ("data:image/png" in report) == (samples and not is_text)
    if samples:
        kind = "txt" if is_text else "png"
        assert (folder / "samples" / f"step_00000010.{kind}").stat().st_size > 200
        (job,) = (p for p in (folder / "samples").iterdir() if p.is_dir())
        assert len(np.load(job / "samples.npz")["x"]) == 8
        assert (job / f"samples.{kind}").is_file()
    assert not list(folder.rglob(".*")), "a temporary file was left behind"


def test_tensorflow_is_never_imported(root, process, tmp_path):
    """Training, sampling and evaluation, with a TensorFlow that must not be touched."""
    (tmp_path / "tensorflow").mkdir()
    poison = "raise AssertionError('TensorFlow was imported')\n"
    (tmp_path / "tensorflow" / "__init__.py").write_text(poison)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from diffusionlab import main
run = {str(tmp_path / "run")!r}
config = {str(root / "configs/cifar10/denoising.py")!r} + ":smoke"
assert main.run(["--config=" + config, "--workdir=" + run]) == 0
assert main.run(["--workdir=" + run, "--mode=sample", "--num_samples=4"]) == 0
assert main.run(["--workdir=" + run, "--mode=eval"]) == 0
assert not [n for n in sys.modules if n.split(".")[0] == "tensorflow"]
"""
    # With the programs of the test before this one.
    process("-c", script, devices=8)
