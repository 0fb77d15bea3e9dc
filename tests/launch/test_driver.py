"""The driver against an engine of whose jobs the test decides, and real files."""

import json
import socket
import time

import pytest

from launch import driver, single, sweep, worker
from launch.engines import EngineError
from launch.trial import Trial, failures


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
    here.engine.start("1")
    here.engine.end("1", "failed")
    here.turn()
    # An array has a limit of its own, and the two of the first one live.
    assert here.engine.parallel == 1


def test_an_array_is_as_long_as_the_cluster_allows(make, engine, monkeypatch):
    monkeypatch.setattr(driver, "_BATCH", 2)
    here = make(engine(queues=True))
    assert _states(here) == ["queued"] * 3
    arrays = [submission for _, submission, _ in here.engine.jobs.values()]
    assert [arrays.count(a) for a in dict.fromkeys(arrays)] == [2, 1]


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
    assert failures(Trial(folder).events()) == 0


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


def test_a_process_that_the_system_ended_for_want_of_memory(make, monkeypatch):
    here = make()
    here.turn()
    folder = here.engine.jobs["1"][0].folder
    Trial(folder).record("started", job="1", host=socket.gethostname(), kills=3)
    del here.engine.live["1"]
    monkeypatch.setattr(worker, "kills", lambda: 4)
    here.turn()
    assert Trial(folder).attempts()[0].cause == "out of memory"


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
    assert failures(Trial(folder).events()) == 1


def test_a_resume_does_not_hide_why_a_job_went(tmp_path, engine):
    one = Trial(tmp_path)
    one.create({"max_failures": 1, "overrides": {}, "cwd": "/"})
    here = driver.Driver(single.Single(tmp_path), engine(), print, "here")
    here.turn()
    here.engine.start("1")
    del here.engine.live["1"]
    books = single.Single(tmp_path)
    books.retry(given_up=False)
    again = driver.Driver(books, here.engine, print, "here")
    assert again.turn() == {one.name: "queued"}
    assert [a.cause for a in one.attempts()] == ["killed", None]


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
    assert failures(Trial(here.engine.jobs["1"][0].folder).events()) == 0


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


def test_a_refused_submission_leaves_the_trials_as_they_were(make, engine, monkeypatch):
    here = make(engine(broken=True))
    with pytest.raises(EngineError, match="no room"):
        here.turn()
    here.engine.broken = False
    assert _states(here) == ["submitting", "submitting"]  # it may be under way
    now = time.time()
    monkeypatch.setattr(driver.time, "time", lambda: now + 11)
    assert _states(here) == ["queued", "queued"]
    assert {failures(t.events()) for t in here.books.everything()} == {0}


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
    trials = here.books.everything()
    assert {failures(t.events()) for t in trials} == {0}
    ended = {a.cause for t in trials for a in t.attempts() if a.cause}
    assert ended == {"preempted"}


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
    # Nor does it ask in vain.
    steps = [t.params["steps"] for t in here.books._study.trials]
    assert len(steps) == len(set(steps)) == 3


def test_a_search_that_has_no_more_points_ends(make):
    here = make(sweeps=["search_two"], num_trials=3, max_parallel=3)
    assert _states(here) == ["queued", "queued"]
    for name in list(here.engine.live):
        here.engine.start(name)
        here.engine.end(name, "done")
    here.turn()
    assert here.books.is_complete() and len(here.engine.jobs) == 2


def test_a_search_whose_point_cannot_be_hands_over_the_others_first(make):
    here = make(sweeps=["search_bad"], num_trials=3, max_parallel=1)
    (trial,) = here.books.more(1)
    other = make(sweeps=["search_bad"], num_trials=3, max_parallel=2)
    with pytest.raises(ValueError, match="num_stesp"):
        other.turn()
    assert trial.attempts()[0].job == "1"


def test_hopeless_trials_are_pruned(make):
    more = [{"config.train.num_steps": 100 + number} for number in range(5)]
    here = make(prune="median", max_parallel=1, extra=more)
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


def test_another_definition_is_refused(make):
    make()
    for changes in (
        {"overrides": {"config.seed": "1"}},
        {"goal": "max"},
        {"seeds": 2},
        {"sweeps": ["search"], "num_trials": 1},
    ):
        with pytest.raises(sweep.SweepError, match="another sweep"):
            make(**changes)
    with pytest.raises(sweep.SweepError, match="another sweep"):
        make(extend=True, goal="max")


def test_an_extended_sweep_adds_its_points(make):
    make().turn()
    here = make(extend=True, seeds=2, max_parallel=9)
    assert here.books.waiting() == 4  # one has not begun; three are of the second seed
    points = [t.asked()["point"] for t in here.books.more(9)]
    assert [p["config.seed"] for p in points] == [0, 1, 1, 1]
    searched = make(extend=True, sweeps=["search"], num_trials=2, max_parallel=9)
    assert searched.books.waiting() == 2 and len(searched.books.more(9)) == 2
    back = make(extend=True, seeds=2)
    assert back.books.waiting() == 0


def test_what_a_killed_start_left_half_done_is_taken_up(make, tmp_path, monkeypatch):
    """Killed between naming a trial and making its directory, and while enqueueing."""
    here = make()
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "_create", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            here.books.more(1)
    assert not list((tmp_path / "sweep").glob("runs/*"))
    assert _states(make()) == ["queued", "queued"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".sweep.json.1").write_text("{")
    other = make(folder="other")
    (tmp_path / "other" / "optuna.journal").unlink()  # as if nothing was enqueued yet
    again = sweep.Sweep(other.books.folder)
    assert again.is_complete() and again.enqueue() == 3 and again.waiting() == 3


def test_jobs_that_may_live_elsewhere_are_not_started_again(make):
    here = make()
    here.turn()
    with pytest.raises(driver.DriverError, match="may still live at here"):
        driver.check_place(here.books, "slurm", {})
    for name in list(here.engine.live):
        here.engine.start(name)
        here.engine.end(name, "preempted")
    driver.check_place(here.books, "slurm", {})
    assert driver.place("xpk", {"zone": "z", "cluster": "c"}) == "xpk z c"


def test_a_trial_that_the_cluster_cancelled_ends_the_sweep(make):
    here = make(max_parallel=3)
    here.turn()
    here.engine.cause = lambda job: ("cancelled", "Slurm: CANCELLED")
    here.engine.live.clear()
    found = here.turn()
    assert set(found.values()) == {"cancelled"} and here._is_over(found)


def test_a_job_that_does_not_go_is_ended(make, monkeypatch):
    here = make(max_parallel=1)
    here.turn()
    here.engine.start("1")
    here.engine.end("1", "done")
    here.engine.live["1"] = "running"
    here.turn()
    assert not here.engine.stopped
    now = time.monotonic()
    monkeypatch.setattr(driver.time, "monotonic", lambda: now + 601)
    here.turn()
    assert here.engine.stopped == ["1"]
    here.turn()
    assert not here._lingering


def test_finished_trials_of_a_cancelled_sweep_are_not_run_again(make):
    here = make(max_parallel=3)
    here.turn()
    here.books.cancel()
    for name in list(here.engine.live):
        here.engine.start(name)
        here.engine.end(name, "done")
    assert here.books.retry(given_up=True) == []
    here.turn()
    assert here.books.is_complete() and len(here.engine.jobs) == 3


def test_a_driver_at_work_ends_what_was_cancelled_behind_its_back(make):
    here = make()
    make(here.engine).books.cancel()
    assert here.turn() == {}
    other = make()
    other.books.retry(given_up=False)
    other.turn()
    (other.books.folder / "cancelled").touch()  # jobs that the other did not see
    other.turn()
    assert sorted(other.engine.stopped) == ["1", "2"]


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
