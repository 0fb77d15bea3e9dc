import dataclasses

import jax
import numpy as np
import pytest

from diffusionlab import experiment as experiment_lib
from diffusionlab import keys, sharding
from diffusionlab import state as state_lib
from diffusionlab.types import Role

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


class Objective:
    """Roles are all that a state needs of an objective."""

    def __init__(self, **roles):
        self.roles = roles


@pytest.fixture(scope="module")
def built(smoke):
    averages = "{'name': 'power', 'sigma_rel': 0.1}"
    return experiment_lib.build(smoke("mixture", f"ema.long={averages}"))


def with_roles(built, **roles):
    block = built.optim["denoiser"]
    return dataclasses.replace(
        built, objective=Objective(**roles), optim=dict.fromkeys(roles, block)
    )


def mesh_of(built, sizes):
    names = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    return sharding.make_mesh(dataclasses.replace(built.mesh, **names))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def states(built):
    found = {}
    for sizes in MESHES:
        mesh = mesh_of(built, sizes)
        with jax.set_mesh(mesh):
            found[sizes] = state_lib.init(built, mesh), state_lib.abstract(built, mesh)
    return found


@pytest.mark.parametrize("sizes", MESHES)
def test_state_starts_where_and_as_the_abstract_state_says(states, sizes):
    state, abstract = states[sizes]
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, said in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (said.shape, said.dtype)
        assert leaf.sharding.is_equivalent_to(said.sharding, leaf.ndim)


def test_state_does_not_depend_on_the_mesh(states):
    first, *others = (state for state, _ in states.values())
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            first,
            other,
        )


def test_train_state_falls_as_one_over_fsdp(built):
    def size(sizes):
        mesh = mesh_of(built, sizes)
        abstract = state_lib.abstract(built, mesh)
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return sharding.total_bytes(abstract, where), abstract

    whole, abstract = size((8, 1, 1))
    # What no axis divides: counts, and the vectors of the two data dimensions.
    rest = sum(
        leaf.size * 4
        for leaf in jax.tree.leaves(abstract)
        if max(leaf.shape, default=1) % 8
    )
    assert rest < 0.02 * whole
    for fsdp in (2, 4, 8):
        assert size((8 // fsdp, fsdp, 1))[0] == pytest.approx(
            (whole - rest) / fsdp + rest, rel=0.01
        )


def test_state_is_a_function_of_the_seed(built):
    again = state_lib.create(built)
    equal(again, state_lib.create(built))
    other = dataclasses.replace(built, config={**built.config, "seed": 1})
    a, b = (jax.tree.leaves(s.params) for s in (again, state_lib.create(other)))
    assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not [leaf for leaf in jax.tree.leaves(again) if "key" in str(leaf.dtype)]


def test_averages_start_at_the_parameters(built):
    state = state_lib.create(built)
    assert set(state.ema) == {"main", "long"} and int(state.step) == 0
    for average in state.ema.values():
        equal(average, state.params)


def test_copied_role_starts_as_its_origin_whatever_the_order(built):
    for roles in (
        dict(a=Role("denoiser", init="copy:b"), b=Role("denoiser")),
        dict(b=Role("denoiser"), a=Role("denoiser", init="copy:b")),
    ):
        params = state_lib.create(with_roles(built, **roles)).params
        equal(params["a"], params["b"])


def test_random_roles_of_one_network_start_differently(built):
    roles = dict(a=Role("denoiser"), b=Role("denoiser"))
    params = state_lib.create(with_roles(built, **roles)).params
    a, b = params["a"]["in"]["kernel"], params["b"]["in"]["kernel"]
    assert not np.allclose(a, b)
    key = keys.key(built.seed, "init/a")
    equal(params["a"], built.networks["denoiser"].init(key))


@pytest.mark.parametrize("init", ["copy:nobody", "zeros", "copy"])
def test_start_that_cannot_be_is_an_error_with_the_role(built, init):
    wrong = with_roles(built, a=Role("denoiser", init=init), b=Role("denoiser"))
    with pytest.raises(ValueError, match=f"role 'a': cannot start as '{init}'"):
        state_lib.create(wrong)


def test_role_keeps_the_averages_it_names(built):
    roles = dict(
        a=Role("denoiser"),
        b=Role("denoiser", ema=("long",)),
        c=Role("denoiser", ema=()),
    )
    state = state_lib.create(with_roles(built, **roles))
    assert {n: set(trees) for n, trees in state.ema.items()} == {
        "main": {"a"},
        "long": {"a", "b"},
    }
    assert set(state.params) == set(state.opt_state) == {"a", "b", "c"}
