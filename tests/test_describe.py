import jax
import numpy as np
import pytest

from diffusionlab import describe, sharding
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib


@pytest.fixture(scope="module")
def described(smoke):
    config = smoke("mixture", "mesh={'data': -1, 'fsdp': 4}")
    return config, describe.describe(config)


def number(text, before, after):
    return int(text.partition(before)[2].partition(after)[0].replace(",", ""))


def test_parameter_count_is_the_actual_one(described):
    config, text = described
    experiment = experiment_lib.build(config)
    params = state_lib.create(experiment).params["denoiser"]
    count = sum(np.size(p) for p in jax.tree.leaves(params))
    assert number(text, "parameters of denoiser: ", "\n") == count
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        assert (
            f"denoiser/{jax.tree_util.keystr(path, simple=True, separator='/')} "
            in text
        )


def test_bytes_are_those_of_the_state_on_one_device(described):
    config, text = described
    experiment = experiment_lib.build(config)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        state = state_lib.init(experiment, mesh)
    device = jax.devices()[0]
    there = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert number(text, "train state: ", " bytes per device") == there
    assert "mesh: data 2, fsdp 4, tensor 1" in text


def test_flops_and_memory_of_each_step_are_named(described):
    _, text = described
    flops = float(text.partition("model FLOPs per step: ")[2].partition("\n")[0])
    # At least the hidden layer, forward and backward, of every example of the batch.
    assert flops > 3 * 16 * 2 * 16 * 16
    assert number(text, "step of phase train: ", " bytes of arguments") > 0


def test_doctor_has_its_parts(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "program").write_bytes(b"x" * 2_000_000)
    text = describe.doctor(tmp_path, str(cache))
    assert text.startswith("devices: 8\n  cpu ")
    for part in (
        "versions:\n",
        f"  jax {jax.__version__}\n",
        "\nrevision: ",
        "\ndisk: ",
    ):
        assert part in text
    assert f"compilation cache: {cache}, 1 files, 2.0 MB" in text
    for dtype in ("float32", "bfloat16"):
        line = text.partition(f"matrix rate, {dtype}: ")[2].partition(" GFLOP/s")[0]
        assert int(line.replace(",", "")) > 0
    assert "data sheet" not in text


def test_doctor_says_when_the_cache_is_off_or_empty(tmp_path):
    assert describe._cache("off") == "off"
    assert describe._cache(str(tmp_path / "none")).endswith(", 0 files, 0.0 MB")
