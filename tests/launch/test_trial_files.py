"""What the files of a trial say."""

import json

import pytest

from launch import trial
from launch.trial import Trial, attempts_of, failures, identity, state


def _event(event, time=0.0, **what):
    return {"event": event, "time": time, **what}


SUBMITTED = [
    _event("submitting", 1.0, submission="s", index=0),
    _event("submitted", 2.0, submission="s", job="7"),
]
STARTED = [*SUBMITTED, _event("started", 3.0, submission="s", job="7")]


def _ended(cause, time=9.0, job="7"):
    return _event("ended", time, job=job, cause=cause, step=4)


def test_identity_does_not_depend_on_the_order():
    a, b = {"config.a": 1, "config.b": "x"}, {"config.b": "x", "config.a": 1}
    assert identity(a) == identity(b) != identity({"config.a": 1})


def test_an_attempt_is_submitted_started_and_ended():
    (one,) = attempts_of([*STARTED, _ended("done")])
    assert (one.job, one.submitted, one.started, one.ended) == ("7", 2.0, 3.0, 9.0)
    assert (one.cause, one.step) == ("done", 4)


def test_a_process_may_start_before_its_job_is_written_down():
    late = [STARTED[0], STARTED[2], STARTED[1]]
    (one,) = attempts_of(late)
    assert (one.job, one.started) == ("7", 3.0)


def test_a_job_that_starts_again_was_put_back_by_its_engine():
    first, second = attempts_of([*STARTED, _event("started", 20.0, job="7")])
    assert (first.cause, first.ended, second.started) == ("preempted", 20.0, 20.0)
    assert second.cause is None


def test_a_job_that_saved_and_started_again_has_two_attempts():
    events = [*STARTED, _ended("preempted"), _event("started", 20.0, job="7")]
    first, second = attempts_of([*events, _ended("done", 30.0)])
    assert (first.cause, second.cause, second.ended) == ("preempted", "done", 30.0)


@pytest.mark.parametrize(
    "events, alive, expected",
    [
        ([], {}, "waiting"),
        (SUBMITTED[:1], {}, "submitting"),
        (SUBMITTED, {"7": "waiting"}, "queued"),
        (STARTED, {"7": "running"}, "running"),
        (SUBMITTED, {}, "gone"),
        (STARTED, {"8": "running"}, "gone"),
        ([*STARTED, _ended("preempted")], {}, "waiting"),
        ([*STARTED, _ended("preempted")], {"7": "waiting"}, "queued"),
        ([*STARTED, _ended("failed")], {}, "waiting"),
        ([*STARTED, _ended("failed"), *STARTED, _ended("killed")], {}, "given up"),
        ([*STARTED, _event("cancelled"), _ended("preempted")], {}, "cancelled"),
        ([*STARTED, _event("cancelled")], {"7": "running"}, "running"),
        ([*STARTED, _event("cancelled")], {}, "cancelled"),
        ([*STARTED, _event("cancelled"), _event("retry")], {}, "gone"),
        ([*STARTED, _event("pruned"), _ended("preempted")], {}, "pruned"),
        (
            [*STARTED, _event("cancelled"), _ended("preempted"), _event("retry")],
            {},
            "waiting",
        ),
    ],
)
def test_state(events, alive, expected):
    assert state(None, events, alive, 2) == expected
    assert state({"step": 1}, events, alive, 2) == "done"


@pytest.mark.parametrize("cause", trial.CAUSES)
def test_what_counts_as_a_failure(cause):
    counted = cause in ("failed", "killed", "out of memory", "lost")
    assert failures([*STARTED, _ended(cause)]) == counted
    again = [*STARTED, _ended(cause), _event("retry")]
    assert failures(again) == 0
    # What became of the job is found out only by the driver of the retry.
    late = [*STARTED, _event("retry"), _ended(cause)]
    assert failures(late) == 0
    next_one = [_event("started", job="9"), _event("ended", job="9", cause=cause)]
    assert failures([*late, *next_one]) == counted


def test_lines_that_are_not_whole_are_left_out(tmp_path):
    one = Trial(tmp_path)
    one.record("submitting", submission="s", index=0)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "sub')
    one.record("submitted", submission="s", job="7")
    assert [e["event"] for e in one.events()] == ["submitting", "submitted"]


def test_a_run_of_more_steps_is_not_finished(tmp_path):
    one = Trial(tmp_path)
    assert one.result() is None
    one.create({"config": "c", "overrides": {}, "num_steps": 20})
    (tmp_path / "result.json").write_text(json.dumps({"step": 10, "numbers": {}}))
    assert one.result() is None
    (tmp_path / "result.json").write_text(json.dumps({"step": 20, "numbers": {}}))
    assert one.result()["step"] == 20


def test_what_was_asked_for_is_written_once(tmp_path):
    one = Trial(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="no run of the launcher"):
        one.asked()
    one.create({"config": "c"})
    one.create({"config": "other"})
    assert one.asked() == {"config": "c"}


def test_values_are_those_that_are_finite(tmp_path):
    rows = [{"step": 1, "m": 3.0}, {"step": 2, "m": "nan"}, {"step": 3, "n": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    one = Trial(tmp_path)
    assert one.values("m") == [(1, 3.0)] and one.step() == 3
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert one.step() == 5
