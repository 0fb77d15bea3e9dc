"""Students wait for their teachers."""

import pytest

from launch import definition, driver, single, worker
from launch.trial import Trial


def test_a_student_waits_for_its_teacher(make, tmp_path):
    teacher = make(folder="teacher")
    teacher.turn()
    students = [{"config.teacher": "teacher", "config.seed": 1}]
    here = make(folder="students", cwd=str(tmp_path), max_parallel=9, extra=students)
    here.engine = teacher.engine
    found = here.turn()
    student = next(n for n, s in found.items() if s == "waiting")
    while not teacher.books.is_complete():
        for name in list(teacher.engine.live):
            if "teacher" in str(teacher.engine.jobs[name][0].folder):
                teacher.engine.start(name)
                teacher.engine.end(name, "done")
        teacher.turn()
    assert here.turn()[student] == "queued"


def test_a_queue_holds_a_student_back_itself(make, engine, tmp_path):
    teacher = make(engine(queues=True), folder="teacher")
    teacher.turn()
    students = [{"config.teacher": "teacher"}]
    here = make(teacher.engine, "students", cwd=str(tmp_path), extra=students)
    here.turn()
    after = [job.after for job, *_ in teacher.engine.jobs.values()]
    assert after.count(("1", "2", "3")) == 1 and after.count(()) == 6


def test_a_teacher_that_is_a_sweep_is_all_of_it(make, engine, tmp_path):
    """One trial is done and one runs: what is not submitted yet may be the best."""
    teacher = make(engine(queues=True), folder="teacher", max_parallel=3)
    teacher.turn()
    for name, cause in (("1", "done"), ("2", "preempted")):
        teacher.engine.start(name)
        teacher.engine.end(name, cause)
    assert driver.after(tmp_path / "teacher", teacher.engine) is None
    teacher.turn()
    assert driver.after(tmp_path / "teacher", teacher.engine) == ["4", "3"]


def test_a_teacher_that_never_comes_is_an_error(make, tmp_path):
    teacher = make(folder="teacher", max_failures=1, max_parallel=3)
    teacher.turn()
    for name in list(teacher.engine.live):
        teacher.engine.start(name)
        teacher.engine.end(name, "failed")
    teacher.turn()
    with pytest.raises(driver.DriverError, match="resume it first"):
        driver.after(tmp_path / "teacher", teacher.engine)
    students = [{"config.teacher": "teacher"}]
    more = dict(cwd=str(tmp_path), extra=students, max_parallel=9)
    here = make(teacher.engine, "students", **more)
    assert sorted(here.turn().values()) == ["queued"] * 3 + ["waiting"]
    here.turn()
    assert list(here.turn().values()).count("given up") == 1


def test_a_trial_of_a_sweep_is_a_teacher_and_has_a_state(make, tmp_path):
    teacher = make(folder="teacher", max_parallel=1)
    teacher.turn()
    (trial,) = teacher.books.everything()
    assert driver.after(trial.folder, teacher.engine) is None
    books = single.Single(trial.folder)
    assert books.max_failures == 2 and books.everything() == [trial]
    teacher.engine.start("1")
    teacher.engine.end("1", "done")
    assert driver.after(trial.folder, teacher.engine) == []


def test_the_best_trial_is_chosen_once(make, tmp_path, monkeypatch):
    teacher = make(folder="teacher", max_parallel=2)
    teacher.turn()
    asked = {"config": "c", "overrides": {"config.teacher": str(tmp_path / "teacher")}}
    with pytest.raises(worker.Unready, match="config.teacher"):
        worker.command(tmp_path / "student", asked)
    for name, value in (("1", 2.0), ("2", 1.0)):
        teacher.engine.start(name)
        teacher.engine.end(name, "done", value=value)
    best = teacher.engine.jobs["2"][0].folder
    assert f"--config.teacher={best}" in worker.command(tmp_path / "student", asked)
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text('{"teacher": {"run": "the first"}}')
    assert "--config.teacher=the first" in worker.command(student, asked)


def test_a_job_that_gets_nowhere_is_ended(tmp_path):
    one = Trial(tmp_path)
    one.create({})
    for _ in range(5):
        assert not worker._is_stuck(one, "7")
        one.record("started", job="7", saved=0)
    assert worker._is_stuck(one, "7") and not worker._is_stuck(one, "8")
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    assert not worker._is_stuck(one, "7")
    (tmp_path / "checkpoints" / "10").rmdir()
    one.record("ended", job="7", cause="preempted")
    assert not worker._is_stuck(one, "7")


def test_a_command_whose_folder_is_gone_says_so(tmp_path):
    asked = {"config": "configs/a.py", "overrides": {}, "cwd": str(tmp_path / "gone")}
    Trial(tmp_path / "run").create(asked)
    with pytest.raises(FileNotFoundError, match="where this was started, is not here"):
        definition.config_of(tmp_path / "run")
