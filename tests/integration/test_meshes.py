"""One run on several meshes; checkpoints go from one to another, whole and in part."""

import shutil

import jax
import numpy as np
import pytest

from diffusionlab import compiled, experiment, restore, settings, sharding, train
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints

# The sums over a batch, and those of matrix products over a split axis, are taken in
# another order on another mesh: a few float32 roundings (6e-8) per step, which ten
# steps of training amplify. A wrong key, slice or gradient moves losses by 1e-2.
CLOSE = dict(rtol=2e-5, atol=1e-6)

# Data and fsdp without tensor are in tests/models/test_models.py.
MESHES = {"8 data": (8, 1, 1), "all": (2, 2, 2)}


def _mesh(sizes):
    data, fsdp, tensor = sizes
    return (f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}")


@pytest.fixture(scope="module")
def one_device():
    """Within it, meshes are made of the first device only."""

    def make(_):
        devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
        return jax.sharding.Mesh(devices, sharding.AXES)

    def use(patch):
        patch.setattr(sharding, "make_mesh", make)

    return use


@pytest.fixture(scope="module")
def alone(smoke, one_device, tmp_path_factory):
    """Ten steps on one device."""
    config = smoke("digits", "logging.every=1")
    folder = tmp_path_factory.mktemp("meshes") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        one_device(patch)
        assert train.train(config, folder) == train.DONE
    return folder


@pytest.fixture(scope="module", params=MESHES)
def spread(request, smoke, tmp_path_factory):
    """The same on a mesh of eight."""
    config = smoke("digits", "logging.every=1", *_mesh(MESHES[request.param]))
    folder = tmp_path_factory.mktemp("meshes") / "spread"
    assert train.train(config, folder) == train.DONE
    return config, folder


def _assert_close(a, b):
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row, other in zip(a, b, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            pair = (np.asarray(r[name], np.float64) for r in (row, other))
            np.testing.assert_allclose(*pair, **CLOSE, err_msg=name)


def test_losses_do_not_depend_on_the_mesh(alone, spread, rows):
    assert len(rows(alone)) == 10
    _assert_close(rows(alone), rows(spread[1]))


def _half(folder, copy):
    """The run as it was after its save at step 5."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "10")
    (copy / "result.json").unlink()
    return copy


def test_a_checkpoint_of_one_device_goes_on_elsewhere(
    alone, spread, rows, tmp_path, capsys
):
    config, _ = spread
    assert train.train(config, _half(alone, tmp_path / "run")) == train.DONE
    assert "resumed from step 5" in capsys.readouterr().out
    _assert_close(rows(alone), rows(tmp_path / "run"))


def test_a_checkpoint_of_a_mesh_goes_on_with_one_device(
    alone, spread, rows, contents, tmp_path, monkeypatch, one_device, capsys
):
    config, folder = spread
    saved = contents(config, _half(folder, tmp_path / "run"), 5)
    one_device(monkeypatch)
    restored = contents(config, tmp_path / "run", 5)
    for name, value in saved.items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)
    assert train.train(config, tmp_path / "run") == train.DONE
    assert "resumed from step 5" in capsys.readouterr().out
    _assert_close(rows(alone), rows(tmp_path / "run"))


def test_state_bytes_fall_with_fsdp(smoke):
    """Per device, all but what no axis can divide: here the small vectors."""

    def held(fsdp):
        built = experiment.build(smoke("digits"))
        mesh = sharding.make_mesh(settings.Mesh(data=-1, fsdp=fsdp))
        state = state_lib.abstract(built, mesh)
        where = jax.tree.map(lambda s: s.sharding, state)
        return sharding.total_bytes(state, where)

    whole = held(1)
    assert held(2) == pytest.approx(whole / 2, rel=0.01)
    assert held(8) == pytest.approx(whole / 8, rel=0.02)


def test_one_average_is_restored_alone(smoke, tmp_path):
    """The rest of the checkpoint may even be gone: nothing of it is read."""
    config = smoke("mixture", "ema.long={'name': 'power', 'sigma_rel': 0.1}")
    folder = tmp_path / "run"
    assert train.train(config, folder) == train.DONE
    built = experiment.build(config)
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        steps = compiled.Steps(built, mesh)
        checkpoints = Checkpoints(folder)
        whole, *_ = checkpoints.restore(10, steps.state, steps.abstract_gathered())
        asked = []
        restore_part = checkpoints.restore_part

        def note(step, part):
            asked.append(part)
            return restore_part(step, part)

        checkpoints.restore_part = note
        found = restore.restore(built, checkpoints, 10, "long", mesh)
    assert [list(part) for part in asked] == [["ema"]]
    assert list(asked[0]["ema"]) == ["long"]
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(whole.ema["long"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(found))
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert size < everything / 4


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(
    smoke, tmp_path
):
    with pytest.raises(ValueError, match=r"config\.mesh: .*3 x 1 x 1.* 8 devices"):
        train.train(smoke("mixture", *_mesh((3, 1, 1))), tmp_path / "run")
    with pytest.raises(ValueError, match=r"config\.data\.batch_size: .*4 examples.*8"):
        train.train(smoke("mixture", "data.batch_size=4"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
