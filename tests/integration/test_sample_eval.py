"""mode=sample and mode=eval: on a run directory alone."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffusionlab import (
    evaluate,
    experiment,
    inference,
    main,
    restore,
    sharding,
    train,
    workdir,
)
from diffusionlab import sample as sample_lib
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints

POWERS = (
    "ema.short={'name': 'power', 'sigma_rel': 0.05}",
    "ema.long={'name': 'power', 'sigma_rel': 0.1}",
)


@pytest.fixture(scope="module")
def trained(smoke, tmp_path_factory):
    """A run with checkpoints 5 and 10, evaluators and power averages."""
    config = smoke("mixture", *POWERS, bare=False)
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train.train(config, folder) == train.DONE
    return folder


@pytest.fixture
def sample(trained, tmp_path):
    """`sample(name, *flags)`: draws into `tmp_path / name`; returns that folder."""

    def run(name, *flags):
        out = tmp_path / name
        words = [f"--workdir={trained}", "--mode=sample", f"--out={out}", *flags]
        assert main.run([*words, "--batch_size=16"]) == 0
        return out

    return run


def _x(folder):
    return np.load(folder / "samples.npz")["x"]


def test_the_run_directory_alone_suffices(trained, capsys):
    assert main.run([f"--workdir={trained}", "--mode=sample"]) == 0
    folder = trained / "samples" / "step_00000010_ema-main_seed-0_n-64"
    assert f"samples in {folder}" in capsys.readouterr().out
    found = np.load(folder / "samples.npz")
    assert found["x"].shape == (64, 2)
    assert np.isfinite(found["x"]).all()
    np.testing.assert_array_equal(found["label"], np.arange(64) % 8)
    assert {p.name for p in folder.iterdir()} == {
        "job.json",
        "samples.npz",
        "samples.png",
    }
    # A finished job is done.
    since = (folder / "samples.npz").stat().st_mtime_ns
    assert main.run([f"--workdir={trained}", "--mode=sample"]) == 0
    assert (folder / "samples.npz").stat().st_mtime_ns == since


def test_sample_i_does_not_depend_on_their_number(sample):
    few, many = (_x(sample(f"n{n}", f"--num_samples={n}")) for n in (10, 40))
    assert few.shape == (10, 2)
    np.testing.assert_array_equal(few, many[:10])
    assert len(np.unique(many, axis=0)) == 40


def test_two_jobs_share_the_work(sample, capsys):
    whole = _x(sample("whole", "--num_samples=40"))
    folder = sample("shared", "--num_samples=40", "--part=0/2")
    assert not (folder / "samples.npz").exists()
    assert "1 parts are still to come" in capsys.readouterr().out
    sample("shared", "--num_samples=40", "--part=1/2")
    np.testing.assert_array_equal(_x(folder), whole)
    assert not list(folder.glob("part_*"))


def test_an_interrupted_job_goes_on(sample, monkeypatch):
    whole = _x(sample("whole", "--num_samples=40"))
    draw_many, calls = inference.draw_many, []

    def counted(*args):
        calls.append(args[4][0])
        return draw_many(*args)

    def interrupted(*args):
        if args[4][0] == 16:
            raise KeyboardInterrupt
        return draw_many(*args)

    monkeypatch.setattr(inference, "draw_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample("broken", "--num_samples=40")
    monkeypatch.setattr(inference, "draw_many", counted)
    folder = sample("broken", "--num_samples=40")
    assert calls == [16, 32]
    np.testing.assert_array_equal(_x(folder), whole)


def test_whoever_comes_late_finds_the_job_done(sample, monkeypatch, capsys):
    """Two end their last parts at once, and one of them joins all first."""
    join = sample_lib._join

    def twice(*args):
        join(*args)
        join(*args)

    monkeypatch.setattr(sample_lib, "_join", twice)
    assert len(_x(sample("job", "--num_samples=20"))) == 20
    assert "still to come" not in capsys.readouterr().out


def test_one_class_is_drawn(sample):
    folder = sample("three", "--num_samples=16", "--label=3")
    found = np.load(folder / "samples.npz")
    assert set(found["label"]) == {3}
    mixed = np.load(sample("mixed", "--num_samples=16") / "samples.npz")
    same = mixed["label"] == 3
    np.testing.assert_array_equal(found["x"][same], mixed["x"][same])
    assert not np.array_equal(found["x"][~same], mixed["x"][~same])


def test_seed_average_and_step_make_a_difference(sample):
    flags = (
        (),
        ("--seed=1",),
        ("--ema=none",),
        ("--ema=sigma_rel=0.08",),
        ("--step=5",),
    )
    found = [
        _x(sample(f"job{i}", "--num_samples=16", *words))
        for i, words in enumerate(flags)
    ]
    assert len({x.tobytes() for x in found}) == len(flags)
    assert all(np.isfinite(x).all() for x in found)


def test_a_reconstructed_average_that_was_stored_is_that_average(trained):
    """At the width of a stored one, and its step."""
    built = experiment.build(workdir.read_config(trained))
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        found, stored = (
            restore.restore(built, Checkpoints(trained), 10, name, mesh)
            for name in ("sigma_rel=0.1", "long")
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        stored,
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ema=mian",), "no average 'mian'; there are: long, main, short, none"),
        (("--step=7",), r"no checkpoint of step 7; there are: \[5, 10\]"),
        (("--label=8",), "expected 0 to 7, got 8"),
        (("--num_samples=0",), "at least 1"),
        (("--part=2/2",), "K/N"),
        (("--part=x",), "K/N"),
        (("--config.seed=1",), "seed: 0 -> 1"),
    ],
)
def test_a_flag_that_does_not_fit_is_refused(sample, flags, said, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=said):
        sample("job", *flags)
    assert not (tmp_path / "job").exists()


def test_the_folder_of_another_job_is_refused(sample):
    folder = sample("job", "--num_samples=10")
    before = (folder / "samples.npz").read_bytes()
    with pytest.raises(ValueError, match="another job.*seed"):
        sample("job", "--num_samples=10", "--seed=5")
    with pytest.raises(ValueError, match="another job.*sampler"):
        sample("job", "--num_samples=10", "--config.sampler.num_steps=3")
    assert (folder / "samples.npz").read_bytes() == before


def test_a_folder_without_a_run_is_named(tmp_path):
    for mode in ("sample", "eval"):
        with pytest.raises(FileNotFoundError, match="holds no run"):
            main.run([f"--workdir={tmp_path}", f"--mode={mode}"])


def _evals(folder):
    return sorted(p.name for p in (folder / "evals").glob("*.json"))


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evals")
    return tmp_path / "run"


def test_evaluation_of_the_newest_repeats_that_of_the_run(trained, copy):
    assert main.run([f"--workdir={copy}", "--mode=eval"]) == 0
    assert _evals(copy) == _evals(trained)
    for name in _evals(copy):
        ours, theirs = (
            json.loads((f / "evals" / name).read_text()) for f in (copy, trained)
        )
        assert ours["step"] == 10
        assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=1e-4)


def test_evaluation_of_a_step(copy, capsys):
    assert main.run([f"--workdir={copy}", "--mode=eval", "--step=5"]) == 0
    assert _evals(copy) == ["step_00000005_held_out.json", "step_00000005_mixture.json"]
    assert "step 5, ema main" in capsys.readouterr().out


def test_evaluation_of_another_average_overwrites_nothing(copy):
    assert main.run([f"--workdir={copy}", "--mode=eval"]) == 0
    before = {p: p.read_bytes() for p in (copy / "evals").iterdir()}
    assert main.run([f"--workdir={copy}", "--mode=eval", "--ema=none"]) == 0
    assert {p: p.read_bytes() for p in before} == before
    assert "step_00000010_ema-none_held_out.json" in _evals(copy)


def test_follow_evaluates_each_checkpoint_and_ends(copy):
    assert main.run([f"--workdir={copy}", "--mode=eval", "--follow"]) == 0
    steps = {int(name.split("_")[1]) for name in _evals(copy)}
    assert steps == {5, 10}


def test_follow_passes_over_a_checkpoint_that_went_away(copy, monkeypatch, capsys):
    """The run keeps only so many: one may go between the look and the read."""
    restored = restore.restore

    def late(built, checkpoints, step, *args):
        if step == 10:
            (copy / "checkpoints" / "10").rename(copy / "checkpoints" / "12")
        return restored(built, checkpoints, step, *args)

    monkeypatch.setattr(restore, "restore", late)
    words = [f"--workdir={copy}", "--mode=eval", "--follow"]
    assert main.run([*words, "--config.train.num_steps=12"]) == 0
    assert {int(name.split("_")[1]) for name in _evals(copy)} == {5, 12}
    assert "step 10: its checkpoint was removed" in capsys.readouterr().out


def test_follow_waits_for_the_first_checkpoint(copy, tmp_path, monkeypatch, capsys):
    """Before the run has made its folder of checkpoints, and before its first save."""
    aside, looks = tmp_path / "aside", []
    (copy / "checkpoints").rename(aside)

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 1:
            (copy / "checkpoints").mkdir()
        elif len(looks) == 2:
            shutil.copytree(aside / "10", copy / "checkpoints" / "10")

    monkeypatch.setattr(evaluate.time, "sleep", sleep)
    assert main.run([f"--workdir={copy}", "--mode=eval", "--follow"]) == 0
    assert len(looks) == 2
    assert capsys.readouterr().out.count("no checkpoint yet; waiting") == 1
    assert {int(name.split("_")[1]) for name in _evals(copy)} == {10}


def test_parts_of_a_run_that_goes_on_need_a_step(copy, tmp_path):
    (copy / "result.json").unlink()
    words = [f"--workdir={copy}", "--mode=sample", "--num_samples=8", "--part=0/2"]
    with pytest.raises(ValueError, match="not finished.*give --step=10"):
        main.run(words)
    out = tmp_path / "job"
    assert main.run([*words, "--step=10", "--batch_size=4", f"--out={out}"]) == 0
    assert list(out.glob("part_*"))


def test_memory_of_sampling_does_not_grow_with_the_steps(smoke):
    """Of the compiled program, on one device: eight steps against 256."""

    def temporaries(num_steps):
        built = experiment.build(smoke("digits", f"sampler.num_steps={num_steps}"))
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES
        )
        with jax.set_mesh(mesh):
            draw = inference.make_draw(built, mesh)
            params = state_lib.abstract_params(built)
            index = jax.ShapeDtypeStruct((64,), np.int32)
            compiled = draw.lower(params, 0, index, index).compile()
            return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(8), temporaries(256)
    assert few > 64 * 64 * 4
    assert many == pytest.approx(few, rel=0.01)
