"""The best checkpoint of a run stays, also over accidents and restarts."""

import errno
import importlib
import json
import textwrap

import pytest

from diffusionlab import train, workdir, writers
from diffusionlab.checkpoint import Checkpoints

SCORES = """
    import dataclasses
    from diffusionlab import types

    BROKEN, CALLS = [], []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Scores:
        '''A number from a table; below 0 it is NaN.'''

        values: tuple
        every: int = 2

        def __call__(self, context):
            CALLS.append(context.step)
            if context.step in BROKEN:
                raise ValueError("the samples are not finite")
            value = self.values[context.step // self.every - 1]
            return types.EvalResult({"d": value if value >= 0 else float("nan")})
"""
VALUES = (3.0, 2.0, -1.0, 1.0, 5.0, 4.0)  # at steps 2, 4, ..., 12


class Accident(Exception):
    pass


@pytest.fixture(scope="module")
def make(smoke, tmp_path_factory):
    """`make(*overrides)`: a config that keeps one checkpoint and the best."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "scores.py").write_text(textwrap.dedent(SCORES))
    block = {"name": "scores:Scores", "values": VALUES, "every": 2}
    saves = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.best='s/d'")
    saves = (*saves, "checkpoint.best_mode='min'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield lambda *more: smoke("mixture", *saves, f"evals={{'s': {block}}}", *more)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best") / "run"
    assert train.train(make(), folder) == train.DONE
    return folder


def best(folder):
    record = json.loads((folder / "best.json").read_text())
    assert record.pop("metric") == "s/d"
    return record


def test_the_best_checkpoint_stays_besides_the_newest(whole, steps_of):
    assert steps_of(whole) == [8, 10]
    assert best(whole) == {"mode": "min", "step": 8, "value": 1.0}
    assert workdir.best_step(whole) == 8


def test_accidents_and_restarts_change_nothing(
    make, whole, rows, steps_of, tmp_path, monkeypatch
):
    folder, save = tmp_path / "run", Checkpoints.save

    def wreck(self, step, *args):
        if step == 8:
            raise Accident
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", wreck)
        with pytest.raises(Accident):
            train.train(make(), folder)
    assert best(folder)["step"] == 8 and steps_of(folder) == [4, 6]
    assert workdir.best_step(folder) == 4, "8 was never saved"
    with monkeypatch.context() as patch:
        patch.setattr(train.Preemption, "reached", lambda self, now: now == 7)
        assert train.train(make(), folder) == train.PREEMPTED
    assert steps_of(folder) == [4, 7]
    assert best(folder) == {"mode": "min", "step": 4, "value": 2.0}
    assert train.train(make(), folder) == train.DONE
    assert steps_of(folder) == steps_of(whole)
    assert best(folder) == best(whole)
    # repr: NaN equals itself.
    assert repr(rows(folder)) == repr(rows(whole))


def test_an_evaluator_that_fails_costs_no_step(
    make, whole, contents, same, rows, steps_of, tmp_path, monkeypatch
):
    """What failed is done again, from the checkpoint of its own step."""
    folder, scores = tmp_path / "run", importlib.import_module("scores")
    with pytest.raises(ValueError, match="best: .* no number 'e' at step 2.*gave: d"):
        train.train(make("checkpoint.best='s/e'"), folder)
    assert steps_of(folder) == [2]
    # A row stays as it is, and the evaluator may be mended.
    assert "eval/s/d" not in {name for row in rows(folder) for name in row}
    monkeypatch.setattr(scores, "BROKEN", [4])
    for _ in range(2):
        monkeypatch.setattr(scores, "CALLS", [])
        with pytest.raises(ValueError, match="evals.s: at step 4, the samples are not"):
            train.train(make(), folder)
        assert steps_of(folder) == [2, 4]
    assert scores.CALLS == [4]
    assert best(folder)["step"] == 2
    monkeypatch.setattr(scores, "BROKEN", [])
    monkeypatch.setattr(scores, "CALLS", [])
    assert train.train(make(), folder) == train.DONE
    assert scores.CALLS == [4, 6, 8, 10]
    assert steps_of(folder) == steps_of(whole) and best(folder) == best(whole)
    assert repr(rows(folder)) == repr(rows(whole))
    assert same(contents(make(), folder, 10), contents(make(), whole, 10))


def test_no_checkpoint_stands_for_a_row_that_was_lost(
    make, steps_of, tmp_path, monkeypatch
):
    write = writers.MetricsFile.scalars

    def lose(self, step, values):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, step, values)

    monkeypatch.setattr(writers.MetricsFile, "scalars", lose)
    with pytest.raises(OSError, match="No space"):
        train.train(make(), tmp_path / "run")
    assert steps_of(tmp_path / "run") == [2]


def test_another_best_may_be_asked_for_when_a_run_goes_on(make, whole, steps_of):
    longer = make("checkpoint.best_mode='max'", "train.num_steps=12")
    assert train.train(longer, whole) == train.DONE
    assert steps_of(whole) == [10, 12]
    assert best(whole) == {"mode": "max", "step": 10, "value": 5.0}
