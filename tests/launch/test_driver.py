"""The driver against an engine of whose jobs the test decides, and real files."""

import json
import time

import pytest

from launch import driver, sweep
from launch.engines import EngineError
from launch.trial import Trial


def _states(here):
    return [s for _, s in sorted(here.turn().items())]


def test_at_most_so_many_at_a_time(make):
    here = make()
    assert _states(here) == ["queued", "queued"]
    assert _states(here) == ["running", "running"]
    here.engine.start("1")
    here.engine.end("1", "done")
    assert _states(here) == ["done", "running", "queued"]
    assert len(here.engine.jobs) == 3


def test_an_engine_with_a_queue_takes_all_at_once(make, engine):
    here = make(engine(queues=True))
    assert _states(here) == ["queued"] * 3
    assert here.engine.parallel == 2


def test_to_the_end(make):
    here = make()
    here.turn()
    while not here.books.is_complete():
        for name in list(here.engine.live):
            here.engine.start(name)
            here.engine.end(name, "done", value=float(name))
        here.turn()
    study = here.books._study
    assert [t.value for t in study.trials] == [1.0, 2.0, 3.0]
    assert len(here.engine.jobs) == 3


def test_a_preempted_trial_goes_on_at_no_cost(make):
    here = make()
    here.turn()
    folder = here.engine.jobs["1"][0].folder
    for count in range(5):
        name = max(here.engine.live, key=int) if count else "1"
        if here.engine.jobs[name][0].folder != folder:
            name = next(
                n for n in here.engine.live if here.engine.jobs[n][0].folder == folder
            )
        here.engine.start(name)
        here.engine.end(name, "preempted")
        assert here.turn()[folder.name] == "queued"
    assert driver.count_failures(Trial(folder)) == 0


def test_a_failing_trial_is_given_up_and_the_sweep_goes_on(make):
    here = make()
    here.turn()
    folder = here.engine.jobs["1"][0].folder
    here.engine.start("1")
    here.engine.end("1", "failed", message="loss is not finite")
    assert here.turn()[folder.name] == "queued"
    again = next(
        n
        for n, (job, *_) in here.engine.jobs.items()
        if job.folder == folder and n > "1"
    )
    here.engine.start(again)
    here.engine.end(again, "failed", message="loss is not finite")
    found = here.turn()
    assert found[folder.name] == "given up"
    assert f"{folder.name}: given up: loss is not finite" in here.said
    assert list(found.values()).count("queued") == 1  # the third trial has its room
    # What was given up is tried again when the user asks.
    assert here.books.retry(given_up=False) == []
    assert here.books.retry(given_up=True) == [folder.name]
    assert here.books.waiting() == 1


@pytest.mark.parametrize("started", [False, True])
def test_a_job_that_goes_without_a_word_counts(make, started):
    here = make()
    here.turn()
    folder = here.engine.jobs["1"][0].folder
    if started:
        here.engine.start("1")
    del here.engine.live["1"]
    assert here.turn()[folder.name] == "queued"
    first = Trial(folder).attempts()[0]
    assert first.cause == ("killed" if started else "lost")
    assert driver.count_failures(Trial(folder)) == 1


def test_a_driver_killed_after_submitting_finds_the_job(make):
    here = make()
    here.turn()
    # As if the driver had not lived to write the two jobs down.
    for name in ("1", "2"):
        folder = here.engine.jobs[name][0].folder
        lines = (folder / "attempts.jsonl").read_text().split("\n")
        kept = [line for line in lines if '"submitted"' not in line]
        (folder / "attempts.jsonl").write_text("\n".join(kept))
    here.engine.start("2")  # this one wrote a line itself
    other = make(here.engine)
    assert _states(other) == ["queued", "running"]
    assert other.engine.stopped == ["1"]
    assert len(here.engine.jobs) == 3
    assert driver.count_failures(Trial(here.engine.jobs["1"][0].folder)) == 0


def test_a_driver_killed_before_submitting_submits_after_a_while(make, monkeypatch):
    here = make()
    (trial,) = here.books.more(1)
    trial.record("submitting", submission="s", index=0)
    assert here.turn()[trial.name] == "submitting"
    now = time.time()
    monkeypatch.setattr(driver.time, "time", lambda: now + 11)
    assert here.turn()[trial.name] == "queued"


def test_a_finished_trial_is_never_run_again(make):
    here = make()
    here.turn()
    here.engine.start("1")
    here.engine.end("1", "done")
    # The driver is killed here, before it has told Optuna.
    other = make(here.engine)
    found = other.turn()
    assert list(found.values()).count("done") == 1
    folders = [job.folder for job, *_ in here.engine.jobs.values()]
    assert len(folders) == len(set(folders)) == 3


def test_a_refused_submission_leaves_the_trials_as_they_were(make, engine):
    here = make(engine(broken=True))
    with pytest.raises(EngineError, match="no room"):
        here.turn()
    here.engine.broken = False
    assert _states(here) == ["queued", "queued"]


def test_cancelled_and_resumed(make):
    here = make()
    here.turn()
    here.books.cancel()
    here.engine.stop(["1", "2"])
    found = here.turn()
    # They went without a word here; what counts is that nothing starts again.
    assert set(found.values()) == {"cancelled"} and len(here.engine.jobs) == 2
    assert here.books.is_cancelled()
    assert len(here.books.retry(given_up=False)) == 2
    assert list(here.turn().values()).count("queued") == 2


def test_a_search_asks_as_there_is_room(make, engine):
    here = make(engine(queues=True), sweeps=["search"], num_trials=5)
    assert _states(here) == ["queued", "queued"]
    for value in range(5):
        name = min(here.engine.live, key=int)
        here.engine.start(name)
        here.engine.end(name, "done", value=float(value))
        here.turn()
    assert here.books.is_complete()
    steps = [t.params["steps"] for t in here.books._study.trials if t.value is not None]
    assert len(steps) == len(set(steps)) == 5


def test_a_search_repeats_its_points_with_other_seeds(make):
    here = make(sweeps=["search"], num_trials=4, seeds=2, max_parallel=4)
    here.turn()
    points = [
        Trial(job.folder).asked()["point"] for job, *_ in here.engine.jobs.values()
    ]
    assert sorted(p["config.seed"] for p in points) == [0, 0, 1, 1]
    steps = [p["config.train.num_steps"] for p in points]
    assert len(set(steps)) == 2


def test_a_resumed_search_does_not_repeat_itself(make):
    for _ in range(3):
        here = make(sweeps=["search"], num_trials=3, max_parallel=1)
        (trial,) = here.books.more(1)
        trial.record("cancelled")
    steps = {t.params["steps"] for t in here.books._study.trials}
    assert len(steps) == 3


def test_a_search_that_has_no_more_points_says_so(make):
    here = make(sweeps=["search_two"], num_trials=3, max_parallel=3)
    with pytest.raises(sweep.SweepError, match="lower --trials"):
        here.turn()


def test_hopeless_trials_are_pruned(make):
    here = make(prune="median", max_parallel=1)
    for number in range(5):
        here.books.enqueue([{"config.train.num_steps": 100 + number}])
    for _ in range(3):
        here.turn()
        (name,) = here.engine.live
        here.engine.start(name)
        here.engine.end(name, "done", value=1.0)
    here.turn()
    (name,) = here.engine.live
    here.engine.start(name)
    folder = here.engine.jobs[name][0].folder
    row = {"step": 5, "train/loss": 9.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    here.turn()
    assert here.engine.stopped == [name]
    Trial(folder).record("ended", job=name, cause="preempted")
    assert here.turn()[folder.name] == "pruned"
    states = [t.state.name for t in here.books._study.trials]
    assert states.count("PRUNED") == 1 and states.count("COMPLETE") == 3


def test_an_extended_sweep_adds_its_points(make, config, asked):
    make()
    other = {**asked, "overrides": {"config.seed": "1"}}
    with pytest.raises(sweep.SweepError, match="another sweep"):
        make(overrides=other["overrides"])
    here = make()
    assert here.books.enqueue([{"config.train.num_steps": 10}]) == 0
    assert here.books.enqueue([{"config.train.num_steps": 77}]) == 1
    assert here.books.waiting() == 4


def test_a_directory_with_something_else_is_refused(make, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "notes.txt").write_text("mine")
    with pytest.raises(sweep.SweepError, match="not empty"):
        make()


def test_one_driver_at_a_time(tmp_path):
    with (
        driver.alone(tmp_path),
        pytest.raises(driver.DriverError, match="is being driven by host"),
        driver.alone(tmp_path),
    ):
        pass
