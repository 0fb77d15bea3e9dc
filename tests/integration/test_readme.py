"""The README's promises: every command in it runs, and the main job is that good."""

import json
import os
import pathlib
import re
import shlex
import shutil

import pytest

from diffusionlab import machine, registry, revision

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def _is_of_this_code(run: pathlib.Path) -> bool:
    """Whether it is finished, and of the very revision and versions that are here."""
    if not (run / "result.json").is_file():
        return False
    record = json.loads((run / "environment.json").read_text())[-1]
    now, versions = revision.git_revision(), machine.versions()
    clean = bool(now) and not now.endswith("+changes")
    return clean and (record["git_revision"], record["versions"]) == (now, versions)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, program) -> pathlib.Path:
    """The main job, run once: by CI right before the tests, or else here."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    if os.environ.get("CI") and _is_of_this_code(ROOT / "runs" / "digits"):
        return shutil.copytree(ROOT / "runs" / "digits", folder)
    words = ["--config=configs/digits/denoising.py", f"--workdir={folder}"]
    program(*words, optimised=True, timeout=900)
    return folder


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
def test_every_command_of_the_tour_runs(tmp_path, digits_run, process, programs):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(digits_run)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    here = dict(cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=600)
    commands = [shlex.split(command) for command in tour()]
    assert len(commands) >= 10
    assert {name for name, *_ in commands} == {"diffusionlab", "python"}
    # Those that need a process of their own: for its devices, or to start others.
    apart = [c for c in commands if "python" in c or "--virtual_devices" in str(c)]
    rest = [words[1:] for words in commands if words not in apart]
    # Of the digits enough is drawn that optimising it is worth the time.
    for of_digits in (True, False):
        chosen = [c for c in rest if ("runs/digits" in str(c)) == of_digits]
        assert chosen
        programs(chosen, optimised=of_digits, **here)
    named = {"python": (), "diffusionlab": ("-m", "diffusionlab.main")}
    for name, *words in apart:
        process(*named[name], *words, **here)
    samples = tmp_path / "runs" / "digits" / "samples"
    assert len(list(samples.glob("*/samples.png"))) == 2
    for folder in ("guided", "heun", "various", "autoguided"):
        assert (tmp_path / "runs" / folder / "samples.npz").exists()
    evals = {path.name for path in (tmp_path / "runs" / "digits" / "evals").iterdir()}
    for stem in ("inversion", "inpainting", "to_three", "samplers_frechet"):
        assert any(stem in name and name.endswith(".png") for name in evals), stem


def test_the_sampler_of_the_readme_works(tmp_path, programs):
    source = re.search(r"```python\n# my_sampler.py\n(.*?)```", TEXT, re.DOTALL)[1]
    (tmp_path / "my_sampler.py").write_text(source)
    both = [f"--workdir={tmp_path / 'run'}", f"--plugins={tmp_path}"]
    sampler = "--config.sampler={'name': 'my_sampler:Euler', 'num_steps': 5}"
    train = ["--config=configs/mixture/denoising.py:smoke", sampler]
    sample = ["--mode=sample", "--num_samples=8", f"--out={tmp_path / 'samples'}"]
    programs([[*both, *train], [*both, *sample]])
    assert (tmp_path / "samples" / "samples.npz").exists()


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:diffusionlab|configs)/[\w/.]+)`", TEXT)
)
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "kind", ["sampler", "grid", "guidance", "extractor", "metric", "paired_metric"]
)
def test_the_readme_names_everything_registered(kind):
    section = TEXT.split("## Samplers\n")[1].split("## Read it\n")[0]
    missing = [n for n in registry.table(kind) if f"`{n}`" not in section]
    assert not missing


def test_the_readme_has_a_row_for_every_method_of_distillation():
    section = TEXT.split("## Distillation\n")[1].split("## Evaluation\n")[0]
    named = {
        name
        for name, place in registry.table("objective").items()
        if place.startswith("diffusionlab.distillation.")
    }
    table = section.split("| method: `NAME.py` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == named
    assert "nineteen methods" in TEXT and len(named) == 19


@pytest.mark.slow
def test_the_digits_run_reaches_its_quality(digits_run):
    numbers = json.loads((digits_run / "result.json").read_text())["numbers"]
    found = {k.removeprefix("eval/samples/"): v for k, v in numbers.items()}
    assert found["agreement_real"] >= 0.97
    assert found["agreement"] >= 0.97
    assert found["precision"] >= 0.8
    assert found["recall"] >= 0.8
    assert found["precision_real"] == pytest.approx(0.97, abs=0.02)
    # Not copies: samples are no nearer to training digits than held-out digits are.
    assert found["nearest_train_ratio"] > 0.9
    assert found["too_close"] < 0.05
    # On features: real digits score 0.69, samples 0.99 and in 95 % up to 1.23.
    assert numbers["eval/quality/frechet"] < 1.5
    assert numbers["eval/quality/frechet_real"] < 1.0
    assert numbers["eval/copies/too_close"] < 0.05
    best = json.loads((digits_run / "best.json").read_text())
    assert best["value"] <= numbers["eval/quality/frechet"]
    pictures = [p.name for p in (digits_run / "evals").glob("*.png")]
    assert "step_00001200_samples_classes.png" in pictures
    assert (digits_run / "report.html").stat().st_size > 10_000
