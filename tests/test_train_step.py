import collections
import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusionlab import compiled, ema, keys, sharding, train_step
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.types import DataSpec, Network, Phase, Process, Role

TRACES = collections.Counter()
BATCH = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TwoNetworks:
    """The student learns the data; in two steps of three aux learns the student.

    Nothing in the losses is random, so a batch may be split as one likes.
    """

    process: Process
    networks: Mapping[str, Network]
    spec: DataSpec

    samples_from = ("student",)
    roles = {"student": Role("student"), "aux": Role("aux", ema=("main",))}

    @property
    def phases(self):
        return {
            "student": Phase(("student",), self.student_loss),
            "aux": Phase(("aux",), self.aux_loss),
        }

    def phase(self, step):
        return "aux" if step % 3 else "student"

    def _apply(self, role, params, inputs):
        cond = {"logsnr": inputs.batch["x"][:, 0], "label": inputs.batch["label"]}
        return self.networks[role].apply(params, inputs.batch["x"], cond)

    def _loss(self, name, output, target, inputs):
        TRACES[name] += 1
        loss = jnp.mean((output - target) ** 2, axis=-1)
        draw = jax.random.uniform(inputs.key)
        count = jnp.float32(loss.shape[0])
        return loss.mean(), {"loss": (loss.sum(), count), "draw": (draw, count / count)}

    def student_loss(self, params, inputs):
        output = self._apply("student", params["student"], inputs)
        return self._loss("student", output, inputs.batch["x"], inputs)

    def aux_loss(self, params, inputs):
        output = self._apply("aux", params["aux"], inputs)
        student = self._apply("student", inputs.params["student"], inputs)
        average = self._apply("student", inputs.ema["main"]["student"], inputs)
        return self._loss("aux", output, student + average + 1, inputs)


NETWORK = {"name": "mlp", "width": 16, "num_layers": 1}
AVERAGES = {
    "main": {"name": "exponential", "decay": 0.9},
    "flat": {"name": "exponential", "decay": 0.5, "warmup": False},
    "power": {"name": "power", "sigma_rel": 0.1},
}


def optimizer(**kw):
    rate = {"name": "constant", "value": 0.01, "warmup_steps": 4}
    return {"name": "adam", "learning_rate": rate, **kw}


@pytest.fixture(scope="module")
def two(smoke):
    def make(*overrides, **optim):
        block = optimizer(**optim)
        config = smoke(
            "mixture",
            f"objective={{'name': '{__name__}:TwoNetworks'}}",
            f"networks={ {'student': NETWORK, 'aux': NETWORK} }",
            f"optim={ {'student': block, 'aux': block} }",
            f"ema={AVERAGES}",
            # It predicts nothing that could be sampled.
            "logging.samples_every=0",
            "evals={}",
            *overrides,
        )
        return experiment_lib.build(config)

    return make


@pytest.fixture(scope="module")
def built(two):
    return two()


@pytest.fixture(scope="module")
def batches():
    def make(step):
        rng = np.random.default_rng(step)
        x = rng.standard_normal((BATCH, 2), np.float32)
        return {"x": jnp.asarray(x), "label": jnp.arange(BATCH) % 8}

    return make


TRACED = collections.Counter()


@functools.cache
def step_of(experiment, name):
    step = train_step.make_train_step(experiment, name)

    def counted(*args):
        TRACED[experiment, name] += 1
        return step(*args)

    return jax.jit(counted)


@functools.cache
def start_of(experiment):
    return jax.jit(lambda: state_lib.create(experiment))()


def gradients(experiment, name, *args):
    return jax.jit(train_step.make_gradients(experiment, name))(*args)


class Runner:
    """Steps of every phase, jitted, and all the states they went through."""

    def __init__(self, experiment):
        self.objective, self.steps, self.empty = experiment.objective, {}, {}
        self.states = [start_of(experiment)]
        example = {
            "x": jax.ShapeDtypeStruct((BATCH, 2), jnp.float32),
            "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        }
        for name in experiment.objective.phases:
            self.steps[name] = step_of(experiment, name)
            shapes = train_step.abstract_accumulator(
                experiment, name, self.states[0], example
            )
            self.empty[name] = train_step.empty(shapes)
        self.gathered = dict(self.empty)

    def run(self, num, batches):
        for step in range(num):
            name = self.objective.phase(step)
            state, self.gathered[name] = self.steps[name](
                self.states[-1], self.gathered[name], batches(step)
            )
            self.states.append(state)
        return self


@pytest.fixture(scope="module")
def ran(built, batches):
    return Runner(built).run(7, batches)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def test_phase_changes_its_own_role_optimiser_and_averages_only(built, ran):
    for step, (old, new) in enumerate(zip(ran.states, ran.states[1:], strict=False)):
        name = built.objective.phase(step)
        other = {"student": "aux", "aux": "student"}[name]
        assert not same(old.params[name], new.params[name])
        assert not same(old.opt_state[name], new.opt_state[name])
        assert same(old.params[other], new.params[other])
        assert same(old.opt_state[other], new.opt_state[other])
        for average in old.ema:
            for role in old.ema[average]:
                assert same(old.ema[average][role], new.ema[average][role]) == (
                    role != name
                ), (step, average, role)
        assert int(new.step) == step + 1


def test_each_phase_is_compiled_once(built, ran):
    assert {name: TRACED[built, name] for name in ran.steps} == {"student": 1, "aux": 1}


def test_all_averages_follow_the_updates_of_their_role(built, ran):
    for role, kept in (("student", set(AVERAGES)), ("aux", {"main"})):
        states = [
            new
            for step, new in enumerate(ran.states[1:])
            if built.objective.phase(step) == role
        ]
        for average in AVERAGES:
            if average not in kept:
                assert role not in ran.states[-1].ema[average]
                continue
            mean = ran.states[0].params[role]
            for update, state in enumerate(states, 1):
                rate = built.ema[average].rate(update)
                mean = ema.update(mean, state.params[role], rate)
            close(ran.states[-1].ema[average][role], mean, rtol=1e-5, atol=1e-7)


def test_learning_rate_metric_follows_the_updates_of_the_role(built, batches):
    runner, seen = Runner(built), collections.defaultdict(list)
    for step in range(9):
        name = built.objective.phase(step)
        state, gathered = runner.steps[name](
            runner.states[-1], runner.empty[name], batches(step)
        )
        runner.states.append(state)
        assert set(gathered["sums"]) == {
            "loss", "draw", f"grad_norm/{name}", f"learning_rate/{name}",
        }  # fmt: skip
        total, count = gathered["sums"][f"learning_rate/{name}"]
        seen[name].append(float(total / count))
    # Warm-up over four updates, to 0.01.
    np.testing.assert_allclose(seen["student"], [0.0025, 0.005, 0.0075], rtol=1e-5)
    np.testing.assert_allclose(
        seen["aux"], [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-5
    )


def test_metrics_add_up_over_steps(built, ran, batches):
    totals = collections.defaultdict(float)
    runner = Runner(built)
    for step in range(7):
        name = built.objective.phase(step)
        _, one = runner.steps[name](ran.states[step], runner.empty[name], batches(step))
        for metric, (total, count) in one["sums"].items():
            totals[name, metric] += np.array([total, count], np.float64)
    assert len(totals) == 8
    for (name, metric), found in totals.items():
        np.testing.assert_allclose(ran.gathered[name]["sums"][metric], found, rtol=1e-5)
    assert totals["student", "loss"][1] == 3 * BATCH
    assert totals["aux", "loss"][1] == 4 * BATCH


def test_key_is_of_the_phase_the_step_and_the_micro_batch(two, batches):
    experiment = two("train.micro_batches=2")
    runner = Runner(experiment).run(2, batches)
    for step, name in enumerate(("student", "aux")):
        drawn = [
            jax.random.uniform(keys.key(0, f"loss/{name}", step, i)) for i in (0, 1)
        ]
        assert drawn[0] != drawn[1]
        total, count = runner.gathered[name]["sums"]["draw"]
        np.testing.assert_allclose(total, sum(drawn), rtol=1e-6)
        assert count == 2


@pytest.mark.parametrize("num", [2, 16])
def test_micro_batches_equal_the_whole_batch(two, built, ran, batches, num):
    split = two(f"train.micro_batches={num}")
    for name in ("student", "aux"):
        state, batch = ran.states[-1], batches(9)
        grads, metrics = gradients(built, name, state, batch)
        split_grads, split_metrics = gradients(split, name, state, batch)
        assert max(jnp.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-3
        close(split_grads, grads, rtol=1e-4, atol=1e-6)
        close(split_metrics["loss"], metrics["loss"], rtol=1e-5)


def test_every_example_is_in_one_micro_batch():
    pieces = train_step._split(jnp.arange(24).reshape(12, 2), 3)
    assert pieces.shape == (3, 4, 2)
    assert sorted(pieces[..., 0].ravel().tolist()) == list(range(0, 24, 2))


def test_gradient_norm_metric_is_before_clipping_and_the_update_after(two, batches):
    experiment = two(
        name="sgd", clip_norm=0.01, learning_rate={"name": "constant", "value": 0.5}
    )
    runner = Runner(experiment).run(1, batches)
    grads, _ = gradients(experiment, "student", runner.states[0], batches(0))
    norm = runner.gathered["student"]["sums"]["grad_norm/student"][0]
    assert norm > 0.1
    np.testing.assert_allclose(norm, optax.tree.norm(grads["student"]), rtol=1e-5)
    old, new = (s.params["student"] for s in runner.states)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new, old))
    np.testing.assert_allclose(moved, 0.5 * 0.01, rtol=1e-4)


def test_first_nonfinite_step_is_noted_per_metric():
    def at(step, loss, bins):
        one = jnp.ones(())
        metrics = {
            "loss": (jnp.float32(loss), one),
            "bins": (jnp.array(bins, jnp.float32), jnp.ones(2)),
        }
        return metrics, jnp.int32(step)

    gathered = train_step.empty(
        {
            "sums": at(0, 0, [0, 0])[0],
            "nonfinite": dict.fromkeys(("loss", "bins"), jnp.int32(0)),
        }
    )
    noted = []
    for step, loss, bins in [
        (4, 1.0, [1, 2]),
        (5, 1.0, [1, np.nan]),
        (6, np.inf, [1, 1]),
        (7, np.nan, [1, 1]),
    ]:
        gathered = train_step.accumulate(gathered, *at(step, loss, bins))
        noted.append({n: int(s) for n, s in gathered["nonfinite"].items()})
    never = int(train_step.NEVER)
    assert noted == [
        {"loss": never, "bins": never},
        {"loss": never, "bins": 5},
        {"loss": 6, "bins": 5},
        {"loss": 6, "bins": 5},
    ]


def test_step_notes_the_first_bad_batch(built, batches):
    def poisoned(step):
        batch = batches(step)
        return {**batch, "x": batch["x"].at[3, 1].set(jnp.nan)} if step == 3 else batch

    gathered = Runner(built).run(6, poisoned).gathered
    found = {
        f"{phase}/{name}": int(step)
        for phase, g in gathered.items()
        for name, step in g["nonfinite"].items()
    }
    # Step 3 trains the student; what comes after is bad as well, and later.
    assert found["student/loss"] == found["student/grad_norm/student"] == 4
    assert found["aux/loss"] == 5
    assert found["student/learning_rate/student"] == train_step.NEVER


@pytest.fixture(scope="module")
def mesh_steps(two):
    experiment = two(
        "train.micro_batches=2", "mesh={'data': 2, 'fsdp': 2, 'tensor': 2}"
    )
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        steps = compiled.Steps(experiment, mesh)
        steps.compile()
        yield experiment, mesh, steps


def test_loop_steps_trace_once_donate_and_equal_one_device(built, mesh_steps, batches):
    experiment, mesh, steps = mesh_steps
    where = sharding.batch_sharding(mesh)
    state, gathered = state_lib.init(experiment, mesh), steps.empty()
    traced = TRACES.copy()
    for step in range(4):
        old, name = state, experiment.objective.phase(step)
        consumed = gathered[name]
        state = steps(step, state, gathered, jax.device_put(batches(step), where))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))
    assert traced == TRACES
    assert steps.compile() is steps.compile()
    expected = state_lib.shardings(experiment, mesh)
    for leaf, said in zip(
        jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(said, leaf.ndim)
    alone = Runner(built).run(4, batches)
    for name in ("student", "aux"):
        np.testing.assert_allclose(
            gathered[name]["sums"]["loss"],
            alone.gathered[name]["sums"]["loss"],
            rtol=1e-4,
        )
    close(state.params, alone.states[-1].params, rtol=1e-2, atol=1e-4)


def test_bfloat16_compute_keeps_parameters_and_gradients_float32(two, built, batches):
    half = two("precision.compute=bfloat16")
    state, new = Runner(half).run(1, batches).states
    grads, _ = gradients(half, "student", state, batches(0))
    reference, _ = gradients(built, "student", state, batches(0))
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves((grads, new))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert set(floats) == {jnp.dtype("float32")}
    assert not same(grads, reference)
    close(grads, reference, rtol=0.1, atol=0.02)
