import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffusionlab import optim, sharding
from diffusionlab.settings import Mesh, Optimizer

AXES = (
    (r"attention/out/kernel$", ("heads", None, "embed")),
    (r"up/kernel$", ("embed", "mlp")),
    (r"down/kernel$", ("mlp", "embed")),
)
RULES = Mesh().rules


def mesh(data, fsdp, tensor):
    return sharding.make_mesh(Mesh(data=data, fsdp=fsdp, tensor=tensor))


def place(path, shape, on, rules=RULES):
    return sharding.place(path, shape, AXES, rules, mesh(*on))


@pytest.mark.parametrize(
    "sizes, shape",
    [((8, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((2, -1, 1), (2, 4, 1)),
     ((1, 1, -1), (1, 1, 8))],
)  # fmt: skip
def test_one_axis_takes_the_remaining_devices(sizes, shape):
    found = mesh(*sizes)
    assert tuple(found.shape[axis] for axis in sharding.AXES) == shape
    assert sharding.batch_shards(found) == shape[0] * shape[1]


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (4, 4, 1), (1, 1, 1)])
def test_sizes_that_do_not_make_the_devices_are_an_error(sizes):
    text = " x ".join(map(str, sizes))
    with pytest.raises(ValueError, match=f"config.mesh: .* = {text} .* the 8 devices"):
        mesh(*sizes)


@pytest.mark.parametrize(
    "block, said",
    [
        (dict(data=-1, fsdp=-1), "one may be -1"),
        (dict(data=0), "positive sizes"),
        (dict(tensor=-2), "positive sizes"),
        (dict(rules={"mlp": "tensr"}), "rules.mlp: unknown mesh axis 'tensr'"),
    ],
)
def test_mesh_that_makes_no_sense_is_an_error(block, said):
    with pytest.raises(ValueError, match=said):
        Mesh(**block)


@pytest.mark.parametrize(
    "path, shape, on, spec, undivided",
    [
        # The rules alone.
        ("mlp/up/kernel", (8, 32), (2, 2, 2), P("fsdp", "tensor"), ()),
        ("mlp/down/kernel", (32, 8), (2, 2, 2), P("tensor", "fsdp"), ()),
        # Logical axes stand for the last dimensions of a stack of layers.
        ("mlp/up/kernel", (3, 8, 32), (2, 2, 2), P(None, "fsdp", "tensor"), ()),
        ("attention/out/kernel", (3, 4, 8, 16), (2, 2, 2),
         P(None, "tensor", None, "fsdp"), ()),
        # Axes of size 1 shard nothing.
        ("mlp/up/kernel", (8, 32), (8, 1, 1), P(), ()),
        ("mlp/up/kernel", (8, 32), (2, 4, 1), P("fsdp"), ()),
        # FSDP falls back to the largest dimension that divides.
        ("other/kernel", (8, 32), (2, 4, 1), P(None, "fsdp"), ()),
        ("other/kernel", (32, 33), (2, 4, 1), P("fsdp"), ()),
        ("mlp/up/kernel", (9, 32), (2, 4, 1), P(None, "fsdp"), ()),
        # ... and is free for it.
        ("mlp/up/kernel", (9, 32), (2, 2, 2), P(None, "tensor"), ("fsdp",)),
        # What cannot be divided is named.
        ("other/kernel", (3, 5), (2, 4, 1), P(), ("fsdp",)),
        ("mlp/up/kernel", (8, 3), (2, 2, 2), P("fsdp"), ("tensor",)),
        ("mlp/up/kernel", (3, 3), (2, 2, 2), P(), ("fsdp", "tensor")),
    ],
)  # fmt: skip
def test_parameter_lies_at(path, shape, on, spec, undivided):
    assert place(path, shape, on) == sharding.Placement(spec, undivided)


def test_first_matching_rule_counts():
    rules = ((r"kernel$", (None, "mlp")), (r"up/kernel$", ("mlp", None)))
    found = sharding.place("up/kernel", (8, 8), rules, RULES, mesh(1, 1, 8))
    assert found.spec == P(None, "tensor")


def test_one_mesh_axis_is_used_once_per_parameter():
    rules = {"embed": "fsdp", "mlp": "fsdp"}
    assert place("up/kernel", (8, 8), (2, 4, 1), rules).spec == P("fsdp")


PARAMS = {
    "mlp": {
        "up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)},
        "down": {"kernel": jnp.ones((32, 8)), "bias": jnp.ones(8)},
    },
    "up": {"kernel": jnp.ones((16, 64))},
}


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "lion", "sgd"])
def test_optimiser_state_lies_as_its_parameters(name):
    on = mesh(2, 2, 2)
    decay = 0.1 if name in ("adamw", "lion", "muon") else 0.0
    block = Optimizer(
        name=name,
        learning_rate=dict(name="constant", value=0.1),
        options=dict(momentum=0.9) if name == "sgd" else {},
        weight_decay=decay,
        multipliers=(("bias", 0.5),),
    )
    state = jax.eval_shape(optim.make(block, PARAMS, "config.optim.x").init, PARAMS)
    places = sharding.place_tree(PARAMS, AXES, RULES, on)
    found = sharding.follow(state, PARAMS, places, on)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    seen = 0
    for path, where in jax.tree_util.tree_leaves_with_path(found):
        path = sharding.path_name(path)
        for kernel, spec in (
            ("mlp/up/kernel", P("fsdp", "tensor")),
            ("mlp/down/kernel", P("tensor", "fsdp")),
            ("/up/kernel", P("fsdp", "tensor")),
        ):
            if path.endswith(kernel):
                assert where.spec == spec, path
                seen += 1
                break
        if path.endswith("count"):
            assert where.spec == P()
    # Each moment of mlp/up, mlp/down and up.
    assert seen >= 3 and seen % 3 == 0


def test_leaf_of_another_shape_falls_back_to_fsdp():
    on = mesh(2, 4, 1)
    places = sharding.place_tree(PARAMS, AXES, RULES, on)
    state = {"row": {"up": {"kernel": jnp.ones(16)}}, "odd": jnp.ones(3)}
    found = sharding.follow(state, PARAMS, places, on)
    assert found["row"]["up"]["kernel"].spec == P("fsdp")
    assert found["odd"].spec == P()


@pytest.mark.parametrize("fsdp", [2, 4, 8])
def test_bytes_per_device_fall_as_one_over_fsdp(fsdp):
    def size(on):
        places = sharding.place_tree(PARAMS, AXES, RULES, on)
        return sharding.total_bytes(PARAMS, sharding.follow(PARAMS, PARAMS, places, on))

    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert size(mesh(8, 1, 1)) == whole
    assert size(mesh(-1, fsdp, 1)) * fsdp == whole
    assert size(mesh(1, 2, 4)) < whole / 2


def test_bytes_are_those_on_the_device():
    on = mesh(2, 2, 2)
    places = sharding.place_tree(PARAMS, AXES, RULES, on)
    where = sharding.follow(PARAMS, PARAMS, places, on)
    put = jax.device_put(PARAMS, where)
    device = jax.devices()[0]
    there = sum(
        s.data.nbytes
        for leaf in jax.tree.leaves(put)
        for s in leaf.addressable_shards
        if s.device == device
    )
    assert sharding.total_bytes(PARAMS, where) == there


def test_table_names_every_parameter_its_bytes_and_what_is_undivided():
    on = mesh(2, 4, 1)
    params = {"up": {"kernel": jnp.ones((8, 32))}, "odd": jnp.ones((3, 5))}
    places = sharding.place_tree(params, AXES, RULES, on)
    lines = sharding.table({"denoiser": (params, places)}, on).splitlines()
    assert lines[0].startswith("mesh: data 2, fsdp 4, tensor 1;")
    odd, up, total, closing = lines[1:]
    assert up.split()[0] == "denoiser/up/kernel" and "(fsdp)" in up
    assert up.split()[-1] == str(8 * 32 * 4 // 4)
    assert odd.endswith("60  not divided by fsdp")
    assert total.split() == ["total", str(8 * 32 + 60)]
    assert closing.strip().startswith("1 parameters cannot be divided")
    assert closing.endswith(": denoiser/odd")


def test_table_has_no_closing_line_when_all_is_divided():
    on = mesh(8, 1, 1)
    places = sharding.place_tree(PARAMS, AXES, RULES, on)
    text = sharding.table({"a": (PARAMS, places)}, on)
    assert "divided" not in text and text.splitlines()[-1].split()[0] == "total"


def test_batch_is_split_over_data_and_fsdp():
    where = sharding.batch_sharding(mesh(2, 2, 2))
    assert where.shard_shape((8, 3)) == (2, 3)
    whole = sharding.replicated(mesh(2, 2, 2))
    assert math.prod(whole.shard_shape((8, 3))) == np.prod((8, 3))


def test_fits_says_whether_a_mesh_suits_the_devices():
    assert sharding.fits(Mesh(data=-1, fsdp=4))
    assert sharding.fits(Mesh(data=2, fsdp=4))
    assert not sharding.fits(Mesh(data=-1, fsdp=16))
    assert not sharding.fits(Mesh(data=1, fsdp=4))
