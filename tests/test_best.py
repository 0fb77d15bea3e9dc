"""Which checkpoint is the best: settings, best.json, and what stays on the disk."""

import json
import types

import numpy as np
import pytest

from diffusionlab import multihost, settings, workdir
from diffusionlab.best import Best
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.state import TrainState

METRIC = "quality/frechet"


def setting(**changes):
    block = {"every": 1, "keep": 1, "best": METRIC, "best_mode": "min"}
    return settings.Checkpoint(**{**block, **changes})


def evaluator(every):
    return {"quality": types.SimpleNamespace(every=every)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best": "frechet"}, "best: expected '<evaluator>/<number>'"),
        ({"best": "/frechet"}, "best: expected '<evaluator>/<number>'"),
        ({"best_mode": "least"}, "best_mode: expected 'min' or 'max', .*got 'least'"),
        ({"best": "", "best_mode": "least"}, "best_mode: expected .*got 'least'"),
        ({"best_mode": ""}, "best_mode: .*'min' or 'max', .*'quality/frechet', got ''"),
    ],
)
def test_settings_that_say_nothing_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        setting(**changes)


def test_a_best_step_has_a_checkpoint():
    settings.check_best(setting(every=5), evaluator(10))
    settings.check_best(setting(best=""), {})
    assert settings.Checkpoint(every=1).best_mode == "", "no end is better by itself"
    with pytest.raises(ValueError, match=r"no number .* config.evals \(s\); .*give ''"):
        settings.check_best(setting(), {"s": None})
    for every in (0, 12):
        with pytest.raises(
            ValueError, match="evals.quality.every: .*every = 5 for.*got"
        ):
            settings.check_best(setting(every=5), evaluator(every))


def run(folder, values, saved):
    """A run directory with these values by step and these checkpoints."""
    rows = [{"step": s, "train/loss": 0.0} for s in values]
    rows += [{"step": s, f"eval/{METRIC}": v} for s, v in values.items()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    for step in saved:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)


def test_the_best_is_the_first_of_the_best_values_with_a_checkpoint(tmp_path):
    values = {1: "nan", 2: 3.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: "-inf", 7: 9.0, 8: "inf"}
    run(tmp_path, values, saved=(1, 2, 4, 5, 6, 7, 8))

    def found(mode, last=None):
        return workdir.find_best(tmp_path, METRIC, mode, last)

    record = {"metric": METRIC, "mode": "min", "step": 4, "value": 2.0}
    assert found("min") == record, "3 has no checkpoint, 6 no finite value"
    assert found("max")["step"] == 7
    assert found("min", last=2)["step"] == 2
    assert found("min", last=1) is None


def test_best_step_is_one_that_can_be_restored(tmp_path):
    with pytest.raises(ValueError, match="--step=best: .* has no best.json"):
        workdir.best_step(tmp_path)
    run(tmp_path, {2: 3.0, 4: 2.0}, saved=(2,))
    best = {"metric": METRIC, "mode": "min", "step": 4, "value": 2.0}
    workdir.write_json(tmp_path / "best.json", best)
    assert workdir.best_step(tmp_path) == 2, "4 is still being saved"
    (tmp_path / "checkpoints" / "4").mkdir()
    assert workdir.best_step(tmp_path) == 4
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "4").rmdir()
    with pytest.raises(ValueError, match=r"is gone; give the number of a step: \[2\]"):
        workdir.best_step(tmp_path)


def save(checkpoints, step):
    params = {"denoiser": {"w": np.full(2, step, np.float32)}}
    state = TrainState(np.int32(step), params, {"denoiser": {}}, {})
    checkpoints.save(step, state, {"n": np.zeros(1)}, {"step": step}, {"step": step})
    checkpoints.wait()


def numbers(value):
    return {f"eval/{METRIC}": value, "eval/quality/recall": 1.0}


def best_of(folder):
    record = json.loads((folder / "best.json").read_text())
    assert workdir.best_step(folder) == record["step"]
    return record["step"], record["value"]


def test_the_best_stays_besides_the_newest_and_the_milestones(tmp_path):
    checkpoints = Checkpoints(tmp_path, setting(keep=2, keep_every=4))
    checkpoints.best.look(0)
    for step, value in enumerate((5.0, 1.0, 2.0, float("nan"), 1.0, 3.0), 1):
        checkpoints.judge(step, ("quality", "other"), numbers(value))
        save(checkpoints, step)
    assert checkpoints.steps() == [2, 4, 5, 6]
    assert best_of(tmp_path) == (2, 1.0), "the first of two equal ones"
    checkpoints.judge(7, ("other",), {"eval/other/x": 0.0})
    save(checkpoints, 7)
    # As at the last step: first saved, then evaluated.
    checkpoints.judge(7, ("quality",), numbers(0.5))
    assert checkpoints.steps() == [4, 6, 7]
    assert best_of(tmp_path) == (7, 0.5)
    with pytest.raises(ValueError, match="no number 'frechet' at step 8.*: recall.$"):
        checkpoints.judge(8, ("quality",), {"eval/quality/recall": 1.0})
    checkpoints.close()


def test_a_superseded_best_that_is_a_milestone_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, setting(keep_every=2, best_mode="max"))
    checkpoints.judge(2, ("quality",), numbers(1.0))
    save(checkpoints, 2)
    save(checkpoints, 3)
    checkpoints.judge(3, ("quality",), numbers(2.0))
    assert checkpoints.steps() == [2, 3]
    assert best_of(tmp_path) == (3, 2.0)
    checkpoints.close()


def test_process_0_decides_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "is_main", lambda: False)
    monkeypatch.setattr(multihost, "all_of", lambda what, own, limit: [3, own])
    best = Best(tmp_path, setting())
    best.offer(7, ("quality",), numbers(1.0))
    assert best.step == 3
    monkeypatch.setattr(multihost, "all_of", lambda what, own, limit: [-1, 7])
    best.look(7)
    assert best.step is None
    assert not list(tmp_path.iterdir())


def test_a_start_from_an_earlier_checkpoint_forgets_what_came_later(tmp_path):
    run(tmp_path, {2: 3.0, 4: 4.0, 6: 1.0}, saved=(2, 4, 6))
    checkpoints = Checkpoints(tmp_path, setting())
    checkpoints.best.look(4)
    assert best_of(tmp_path) == (2, 3.0)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, setting(best_mode="max"))
    checkpoints.best.look(6)
    assert best_of(tmp_path) == (4, 4.0)
    checkpoints.judge(8, ("quality",), numbers(3.5))
    assert best_of(tmp_path) == (4, 4.0), "the value was found again too"
    checkpoints.close()
    for other in (setting(best="quality/recall"), setting(best="")):
        workdir.write_json(tmp_path / "best.json", {"step": 4})
        checkpoints = Checkpoints(tmp_path, other)
        checkpoints.best.look(6)
        assert not (tmp_path / "best.json").exists()
        checkpoints.close()
