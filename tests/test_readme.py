"""The README's promises: every command in it runs, as it is written."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every line of every bash block."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def tour() -> list[str]:
    """The commands after the two of the first section, which set up by themselves."""
    return [c for c in commands() if not c.startswith(("python3 -m venv", "source"))]


def test_first_section_has_the_two_commands_that_ci_runs():
    for marker in ("the main job", "the test command"):
        below = TEXT.split(f"<!-- {marker} -->\n```bash\n")[1].split("\n")[0]
        assert below.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "the main job" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
@pytest.mark.xdist_group("digits")
def test_every_command_of_the_tour_runs(tmp_path, digits_run):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(digits_run)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    programs = {
        "diffusionlab": [sys.executable, "-m", "diffusionlab.main"],
        "python": [sys.executable],
    }
    assert len(tour()) >= 10
    for command in tour():
        name, *words = [w.strip("\"'") for w in command.split()]
        done = subprocess.run(
            [*programs[name], *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    samples = tmp_path / "runs" / "digits" / "samples"
    assert len(list(samples.glob("*/samples.png"))) == 2
    assert (tmp_path / "runs" / "guided" / "samples.npz").exists()


def test_the_sampler_of_the_readme_works(tmp_path, program):
    source = re.search(r"```python\n# my_sampler.py\n(.*?)```", TEXT, re.DOTALL)[1]
    (tmp_path / "my_sampler.py").write_text(source)
    run = tmp_path / "run"
    program(
        "--config=configs/mixture/denoising.py:smoke",
        f"--workdir={run}",
        f"--plugins={tmp_path}",
        "--config.sampler={'name': 'my_sampler:Euler', 'num_steps': 5}",
    )
    program(
        "--mode=sample",
        f"--workdir={run}",
        f"--plugins={tmp_path}",
        "--num_samples=8",
        f"--out={tmp_path / 'samples'}",
    )
    assert (tmp_path / "samples" / "samples.npz").exists()


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:diffusionlab|configs)/[\w/.]+)`", TEXT)
)
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()
