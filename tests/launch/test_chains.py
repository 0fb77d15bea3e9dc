"""Students wait for their teachers."""

import pytest

from launch import driver


def test_a_student_waits_for_its_teacher(make, tmp_path):
    teacher = make(folder="teacher")
    teacher.turn()
    students = [{"config.teacher": "teacher", "config.seed": 1}]
    here = make(folder="students", cwd=str(tmp_path), max_parallel=9)
    here.books.enqueue(students)
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
    here = make(teacher.engine, folder="students", cwd=str(tmp_path))
    here.books.enqueue([{"config.teacher": "teacher"}])
    here.turn()
    after = [job.after for job, *_ in teacher.engine.jobs.values()]
    assert after.count(("1", "2", "3")) == 1 and after.count(()) == 6


def test_a_teacher_that_never_comes_is_an_error(make, tmp_path):
    teacher = make(folder="teacher", max_failures=1, max_parallel=3)
    teacher.turn()
    for name in list(teacher.engine.live):
        teacher.engine.start(name)
        teacher.engine.end(name, "failed")
    teacher.turn()
    with pytest.raises(driver.DriverError, match="resume it first"):
        driver.after(tmp_path / "teacher", teacher.engine)
    here = make(teacher.engine, folder="students", cwd=str(tmp_path), max_parallel=9)
    here.books.enqueue([{"config.teacher": "teacher"}])
    assert sorted(here.turn().values()) == ["queued"] * 3 + ["waiting"]
    here.turn()
    assert list(here.turn().values()).count("given up") == 1
