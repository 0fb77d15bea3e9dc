import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from diffusionlab import workdir
from diffusionlab.workdir import WorkdirError

SAVES = {"checkpoint": {"every": 4}}
CONFIG = {"seed": 0, "train": {"num_steps": 10, "micro_batches": 1}, **SAVES}
LONGER = {"seed": 0, "train": {"num_steps": 20, "micro_batches": 1}, **SAVES}
OTHER = {"seed": 1, "train": {"num_steps": 10, "micro_batches": 1}, **SAVES}


def claim(folder, config=CONFIG, start=1):
    workdir.claim(folder, config, {"start": start}, {"version": start})


def listing(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


@pytest.mark.parametrize("resume", ["auto", "never", "newest_whole"])
def test_new_and_empty_directories_may_be_used(tmp_path, resume):
    workdir.check(tmp_path, CONFIG, resume)
    workdir.check(tmp_path / "new", CONFIG, resume)
    assert not (tmp_path / "new").exists()


def test_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(WorkdirError, match="is not empty and holds no run"):
        workdir.check(tmp_path, CONFIG, "auto")


def test_same_config_may_go_on_unless_resume_is_never(tmp_path):
    claim(tmp_path)
    before = listing(tmp_path)
    workdir.check(tmp_path, CONFIG, "auto")
    workdir.check(tmp_path, LONGER, "auto")
    with pytest.raises(WorkdirError, match="--resume=never does not continue"):
        workdir.check(tmp_path, CONFIG, "never")
    assert listing(tmp_path) == before


def test_another_config_is_refused_with_what_differs(tmp_path):
    claim(tmp_path)
    with pytest.raises(WorkdirError, match="another config.*seed: 0 -> 1$"):
        workdir.check(tmp_path, OTHER, "auto")


def test_claim_records_every_start(tmp_path):
    folder = tmp_path / "a" / "b"
    claim(folder, start=1)
    claim(folder, start=2)
    assert workdir.read_config(folder) == CONFIG
    overrides = json.loads((folder / "overrides.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    assert overrides == [{"start": 1}, {"start": 2}]
    assert environment == [{"version": 1}, {"version": 2}]
    assert sorted(listing(folder)) == [
        "config.json", "environment.json", "overrides.json",
    ]  # fmt: skip


def test_earlier_configs_are_kept(tmp_path):
    claim(tmp_path, CONFIG)
    claim(tmp_path, LONGER)
    claim(tmp_path, CONFIG)
    assert workdir.read_config(tmp_path) == CONFIG
    kept = [json.loads((tmp_path / f"config.{i}.json").read_text()) for i in (0, 1)]
    assert kept == [CONFIG, LONGER]


def test_config_of_no_run_is_an_error_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}' holds no run"):
        workdir.read_config(tmp_path)


def test_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert listing(tmp_path) == {"x.json": '{\n  "a": 1\n}\n'}


def _refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_numbers_that_are_not_finite_are_texts_and_come_back(tmp_path):
    inf, path = math.inf, tmp_path / "x.json"
    numbers = {"mifid": inf, "low": (-inf, 1.5), "in": [{"deep": np.float64("nan")}]}
    written = {"mifid": "inf", "low": ["-inf", 1.5], "in": [{"deep": "nan"}]}
    workdir.write_json(path, {**numbers, "name": "inception", "off": None, "on": True})
    found = json.loads(path.read_text(), parse_constant=_refuse)
    assert found == {**written, "name": "inception", "off": None, "on": True}
    found = workdir.read_json(path)
    assert math.isnan(found["in"][0].pop("deep"))
    assert found == {
        "mifid": inf, "low": [-inf, 1.5], "in": [{}],
        "name": "inception", "off": None, "on": True,
    }  # fmt: skip
    # As runs of earlier versions have them.
    path.write_text("[Infinity]")
    assert workdir.read_json(path) == [inf]


def test_a_run_goes_on_whose_config_has_an_infinity(tmp_path):
    config = {**CONFIG, "sampler": {"churn_max": math.inf}}
    for _ in range(2):
        workdir.check(tmp_path, config, "auto")
        claim(tmp_path, config)
    assert workdir.read_config(tmp_path) == config
    assert not (tmp_path / "config.0.json").exists(), "it is the same config"
    text = (tmp_path / "config.json").read_text()
    json.loads(text, parse_constant=_refuse)


def test_a_file_is_no_run_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(WorkdirError, match="'.*/file' cannot be .*Not a directory"):
        workdir.check(file, CONFIG, "auto")
    with (
        pytest.raises(WorkdirError, match="'.*/file/run' cannot be .*Not a directory"),
        workdir.lock(file / "run"),
    ):
        pass


@pytest.mark.parametrize("name", ["config", "environment"])
def test_a_torn_record_is_named(tmp_path, name):
    claim(tmp_path)
    path = tmp_path / f"{name}.json"
    path.write_text(path.read_text()[:5])
    with pytest.raises(WorkdirError, match=f"{name}.json' is damaged"):
        workdir.check(tmp_path, CONFIG, "auto")
        claim(tmp_path)


def rows(folder, *steps):
    lines = (json.dumps({"step": step}) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_a_run_that_lost_its_checkpoints_does_not_start_afresh(tmp_path):
    claim(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    # Killed before the first save, or while it was under way.
    rows(tmp_path, 2, 4, 8)
    workdir.check(tmp_path, CONFIG, "auto")

    rows(tmp_path, 2, 4, 9)
    with pytest.raises(WorkdirError, match="up to step 9.*checkpoints are gone"):
        workdir.check(tmp_path, CONFIG, "auto")
    (tmp_path / "checkpoints" / "8").mkdir()
    workdir.check(tmp_path, CONFIG, "auto")
    shutil.rmtree(tmp_path / "checkpoints")
    rows(tmp_path, 1)
    with pytest.raises(WorkdirError, match="up to step 1.*checkpoints are gone"):
        workdir.check(tmp_path, CONFIG, "auto")
    (tmp_path / "metrics.jsonl").unlink()
    workdir.check(tmp_path, CONFIG, "auto")
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(WorkdirError, match="checkpoints are gone"):
        workdir.check(tmp_path, CONFIG, "auto")


HOLD = """
import pathlib, sys, time
from diffusionlab import workdir
with workdir.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_in_a_directory(tmp_path):
    """Until it ends, however it ends."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            said = f"trained in by host .*, pid {other.pid}, since 20"
            with pytest.raises(WorkdirError, match=said), workdir.lock(folder):
                pass
            workdir.check(folder, CONFIG, "never")
        finally:
            other.kill()
    with workdir.lock(folder):
        assert f"pid {os.getpid()}" in (folder / "lock").read_text()
    assert (folder / "lock").read_text() == ""


def test_importing_workdir_imports_no_jax():
    code = (
        "import sys\nfrom diffusionlab import workdir\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_launcher_keeps_beside_a_run_is_no_obstacle(tmp_path):
    for name in (*workdir.LAUNCH_FILES, ".trial.json.17"):
        (tmp_path / name).write_text("{}")
    workdir.check(tmp_path, CONFIG, "auto")
    (tmp_path / ".other").write_text("")
    with pytest.raises(WorkdirError, match="not empty"):
        workdir.check(tmp_path, CONFIG, "auto")
