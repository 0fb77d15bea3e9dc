"""Changes of the state between two steps."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusionlab import compiled, sharding, train_step
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.types import Phase, Role, Transition


class Objective:
    """One role is trained, another one is what it was."""

    samples_from = ("student",)
    roles = {
        "student": Role("denoiser"),
        "previous": Role("denoiser", trainable=False),
    }
    transitions = {
        "plain": Transition({"previous": "student"}),
        "average": Transition(
            {"previous": "student@main", "student": "student@main"}, ("student",)
        ),
    }

    def __init__(self, denoising):
        loss = denoising.phases["train"].loss

        def renamed(params, inputs):
            return loss({"denoiser": params["student"]}, inputs)

        self.phases = {"train": Phase(("student",), renamed)}

    def phase(self, step):
        return "train"

    def transition(self, step):
        return {2: "plain", 3: "average"}.get(step)


@pytest.fixture(scope="module")
def built(smoke):
    built = experiment_lib.build(smoke("mixture"))
    optim = {"student": built.optim["denoiser"]}
    objective = Objective(built.objective)
    return dataclasses.replace(built, objective=objective, optim=optim)


@pytest.fixture(scope="module")
def states(built):
    """The state before and after each of five steps of the program."""
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        steps = compiled.Steps(built, mesh)
        steps.compile()
        state, gathered = state_lib.init(built, mesh), steps.empty()
        found = [jax.device_get(state)]
        rng = np.random.default_rng(0)
        for step in range(5):
            size = built.data.batch_size
            batch = {
                "x": rng.normal(size=(size, 2)).astype(np.float32),
                "label": np.arange(size, dtype=np.int32) % 8,
            }
            state = steps(step, state, gathered, batch)
            found.append(jax.device_get(state))
    return found


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def counts(state):
    return [
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "count" in jax.tree_util.keystr(path)
    ]


def test_a_role_that_is_not_trained_has_neither_optimiser_nor_average(states):
    assert set(states[0].params) == {"student", "previous"}
    assert set(states[0].opt_state) == set(states[0].ema["main"]) == {"student"}


def test_a_copy_is_of_the_state_before_the_step(states):
    equal(states[2].params["previous"], states[0].params["previous"])
    equal(states[3].params["previous"], states[2].params["student"])


def test_a_copy_of_an_average_and_a_restart(built, states):
    change = jax.jit(train_step.make_transition(built, "average"))
    state = change(states[3])
    average = states[3].ema["main"]["student"]
    for found in (state.params["previous"], state.params["student"]):
        equal(found, average)
    equal(state.ema["main"]["student"], average)
    assert counts(states[3]) and set(counts(states[3])) == {3}
    assert set(counts(state)) == {0}
    equal(states[4].params["previous"], average)
    assert set(counts(states[4])) == {1} and set(counts(states[5])) == {2}
    assert int(states[5].step) == 5


def test_without_a_restart_optimiser_and_averages_go_on(built, states):
    state = jax.jit(train_step.make_transition(built, "plain"))(states[2])
    equal(state.opt_state, states[2].opt_state)
    equal(state.ema, states[2].ema)
