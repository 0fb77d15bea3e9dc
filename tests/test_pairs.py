"""Stored pairs of noise and sample: what they are, and that drawing goes on."""

import dataclasses
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from diffusionlab import experiment as experiment_lib
from diffusionlab import pairs, sharding, teachers, train, workdir
from diffusionlab.data import base as data
from diffusionlab.samplers import base as samplers

NUM = 100


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "PART", 32)
        yield


@pytest.fixture(scope="module")
def build(student):
    """`build(*overrides)`: experiment, mesh and what is frozen of a reflow student."""

    def make(*overrides):
        built = experiment_lib.build(student("reflow", *overrides))
        mesh = sharding.make_mesh(built.mesh)
        return built, mesh, teachers.load(built, mesh, pathlib.Path("no_such_run"))

    return make


@pytest.fixture(scope="module")
def built(build):
    return build()


def draw(built, folder):
    experiment, mesh, frozen = built
    with jax.set_mesh(mesh):
        return pairs.prepare(experiment, mesh, frozen, folder)


@pytest.fixture(scope="module")
def drawn(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return draw(built, folder), folder


def test_a_pair_is_noise_and_what_the_teacher_makes_of_it(built, drawn):
    experiment, _, frozen = built
    found = drawn[0]
    assert len(found) == NUM and found.spec == experiment.spec
    batch = data.gather(found, np.arange(NUM))
    assert batch["x"].shape == batch["noise"].shape == (NUM, 2)
    assert batch["x"].dtype == batch["noise"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], np.arange(NUM) % 8)
    # 200 numbers of N(0, 1): their mean and square are within 4 deviations.
    assert abs(batch["noise"].mean()) < 4 / 200**0.5
    assert abs((batch["noise"] ** 2).mean() - 1) < 4 * (2 / 200) ** 0.5
    assert len(np.unique(batch["noise"])) == 2 * NUM
    teacher, cond = experiment.teacher.objective, {"label": batch["label"]}
    expected = samplers.sample(
        experiment.objective.sampler,
        experiment.process,
        lambda z, t: teacher.predict(frozen["teacher"], z, t, cond),
        jax.random.split(jax.random.key(1), NUM),
        (2,),
        batch["noise"],
    )
    np.testing.assert_allclose(batch["x"], expected, rtol=1e-5, atol=1e-5)


def test_one_pair_is_a_row(drawn):
    found, batch = drawn[0], drawn[0].__getitems__([5, 9])
    for row, index in enumerate((5, 9)):
        for name, value in found[index].items():
            np.testing.assert_array_equal(value, batch[name][row])


def test_a_pair_depends_on_seed_and_index_alone(build, drawn, tmp_path):
    few = build("objective.num_pairs=40", "data.batch_size=8")
    found = draw(few, tmp_path / "few")
    np.testing.assert_allclose(
        found._stored, np.asarray(drawn[0]._stored[:40]), rtol=1e-5, atol=1e-5
    )
    other = draw(build("objective.num_pairs=40", "seed=1"), tmp_path / "other")
    assert np.all(np.abs(other._stored - found._stored).max(axis=(1, 2)) > 1e-3)


def test_the_objectives_guidance_is_the_pairs(build, drawn, tmp_path):
    guided = draw(build("objective.guidance_scale=3.0"), tmp_path)
    plain = drawn[0]._stored
    np.testing.assert_array_equal(guided._stored[:, 0], plain[:, 0])
    assert np.abs(guided._stored[:, 1] - plain[:, 1]).max() > 1e-4
    about = json.loads((tmp_path / "pairs" / "about.json").read_text())
    assert about["guidance_scale"] == 3.0 and about["num_pairs"] == NUM


class Accident(Exception):
    pass


def test_drawing_goes_on_where_it_was_stopped(built, drawn, tmp_path, monkeypatch):
    write, written = pairs._write, []

    def two(file, array):
        if len(written) == 2:
            file.with_name(".part_00000064.npy.1").write_bytes(b"half")
            raise Accident
        written.append(file.name)
        write(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_write", two)
        with pytest.raises(Accident):
            draw(built, tmp_path)
    assert not (tmp_path / "pairs" / "pairs.npy").exists()
    again = []

    def rest(file, array):
        again.append(file.name)
        write(file, array)

    monkeypatch.setattr(pairs, "_write", rest)
    found = draw(built, tmp_path)
    assert written == ["part_00000000.npy", "part_00000032.npy"]
    assert again == ["part_00000064.npy", "part_00000096.npy"]
    assert found._stored.tobytes() == drawn[0]._stored.tobytes()
    assert not list((tmp_path / "pairs").glob("part_*"))


def test_sigterm_while_pairs_are_drawn_is_a_preemption(student, tmp_path, monkeypatch):
    handler, write = signal.getsignal(signal.SIGTERM), pairs._write

    def then_stop(file, array):
        write(file, array)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pairs, "_write", then_stop)
    # Without a handler of ours the signal would end the tests.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(SystemExit) as stopped:
            train.train(student("reflow"), tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == train.PREEMPTED
    parts = [path.name for path in (tmp_path / "run" / "pairs").glob("part_*")]
    assert parts == ["part_00000000.npy"]


def test_pairs_that_are_there_are_not_drawn_again(built, drawn, monkeypatch):
    monkeypatch.setattr(pairs, "make_draw", None)
    found = draw(built, drawn[1])
    assert found._stored.tobytes() == drawn[0]._stored.tobytes()


def test_pairs_of_something_else_are_refused(build, drawn):
    other = build("objective.sampler.num_steps=9")
    with pytest.raises(workdir.WorkdirError, match="other pairs .differs in sampler"):
        draw(other, drawn[1])


def test_damaged_pairs_are_named(built, tmp_path):
    folder = tmp_path / "pairs"
    draw(built, tmp_path)
    whole = (folder / "pairs.npy").read_bytes()
    (folder / "pairs.npy").write_bytes(whole[:-8])
    with pytest.raises(workdir.WorkdirError, match="pairs.npy' is damaged"):
        draw(built, tmp_path)
    np.save(folder / "pairs.npy", np.zeros((3, 2, 2), np.float32))
    with pytest.raises(workdir.WorkdirError, match=r"has shape \(3, 2, 2\), not"):
        draw(built, tmp_path)


def test_a_teacher_whose_samples_are_not_finite_is_named(built, tmp_path):
    experiment, mesh, frozen = built
    broken = jax.tree.map(lambda leaf: leaf * np.nan, frozen)
    with pytest.raises(workdir.WorkdirError, match="samples are not finite"):
        draw((experiment, mesh, broken), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("objective.sampler.churn=4.0",),
            "config.objective.sampler: Heun draws fresh",
        ),
        (("data.augment={'flip': {}}",), "config.data.augment: pairs of noise"),
    ],
)
def test_pairs_that_cannot_be_are_refused_before_anything_is_written(
    overrides, message, student, tmp_path
):
    with pytest.raises(ValueError, match=f"^{message}"):
        train.train(student("reflow", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_objective_without_a_sampler_says_what_is_missing(built):
    objective = dataclasses.replace(built[0].objective, sampler=None)
    experiment = dataclasses.replace(built[0], objective=objective)
    with pytest.raises(ValueError, match="config.objective.sampler: missing"):
        pairs.check(experiment)


def test_nothing_is_checked_where_no_pairs_are_asked_for(student):
    pairs.check(experiment_lib.build(student("multistep_consistency")))
