"""The step as the loop runs it: compiled once, and never waited for between rows."""

import jax
import numpy as np
import pytest

from diffusionlab import compiled, experiment, train

FEATURES = (
    "precision.compute='bfloat16'",
    "networks.denoiser.remat='nothing_saveable'",
    "train.micro_batches=2",
)


def test_bfloat16_remat_and_micro_batches_run(smoke, rows, contents, tmp_path):
    config = smoke("digits", *FEATURES)
    assert train.train(config, tmp_path / "run") == train.DONE
    losses = [row["train/loss"] for row in rows(tmp_path / "run")]
    assert np.isfinite(losses).all()
    found = contents(config, tmp_path / "run", 10)
    kept = {n: a.dtype for n, a in found.items() if n.startswith("state/") and a.ndim}
    assert set(kept.values()) == {np.dtype("float32")}


def test_rematerialisation_changes_no_loss(smoke, rows, tmp_path):
    for name, remat in (("with", "nothing_saveable"), ("without", "")):
        config = smoke("digits", f"networks.denoiser.remat='{remat}'")
        assert train.train(config, tmp_path / name) == train.DONE
    for a, b in zip(rows(tmp_path / "with"), rows(tmp_path / "without"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


def test_a_step_is_compiled_once(smoke, tmp_path, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        assert train.train(smoke("mixture"), tmp_path / "run") == train.DONE
    said = [r.getMessage() for r in caplog.records]
    compiled = [m for m in said if "Finished XLA compilation of jit(step)" in m]
    assert len(compiled) == 1, compiled


def test_work_is_counted_without_rematerialisation(smoke):
    with_remat, without = (
        experiment.build(smoke("digits", f"networks.denoiser.remat='{remat}'"))
        for remat in ("nothing_saveable", "")
    )
    counts = []
    for built in (with_remat, without):
        mesh = train.sharding.make_mesh(built.mesh)
        with jax.set_mesh(mesh):
            counts.append(compiled.flops_of_step(built, compiled.Steps(built, mesh)))
    assert counts[0] == counts[1] > 0


def test_between_two_rows_nothing_is_fetched_from_the_device(
    smoke, tmp_path, monkeypatch
):
    """The CPU's transfer guard sees no fetch, so every way to fetch is counted."""
    fetched = {}
    now = [None]
    array = type(jax.numpy.zeros(()))
    original = array._value.fget

    def counted(self):
        if now[0] is not None:
            fetched[now[0]] = fetched.get(now[0], 0) + 1
        return original(self)

    monkeypatch.setattr(array, "_value", property(counted))
    call = compiled.Steps.__call__

    def step(self, number, *args):
        result = call(self, number, *args)
        now[0] = number + 1
        return result

    monkeypatch.setattr(compiled.Steps, "__call__", step)
    config = smoke(
        "mixture",
        "train.num_steps=20",
        "logging.every=5",
        "checkpoint.every=100",
    )
    assert train.train(config, tmp_path / "run") == train.DONE
    # Rows at 5, 10, 15; 20 is the last row, and the save.
    assert set(fetched) == {5, 10, 15, 20}
