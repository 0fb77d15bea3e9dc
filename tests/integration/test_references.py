"""Guidance by other runs: found, checked, restored once, and never read by training."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import config as config_lib
from diffusionlab import ema, experiment, inference, main, restore, sharding, train
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints

EVERY_CLASS = np.arange(8, dtype=np.int32)


@pytest.fixture(scope="module")
def folders(smoke, tmp_path_factory):
    """Runs on one mixture: at its start, later, and a classifier; and an exact config.

    The network at its start answers v = 0, which is x = alpha z_t.
    """
    classifier = smoke("mixture", "objective.label_dropout=0.1")
    classifier["networks"] = {
        "classifier": {
            "name": "classifier",
            "width": 8,
            "num_layers": 1,
            "num_heads": 1,
        }
    }
    classifier["objective"] = {
        "name": "noisy_classification",
        "times": {"name": "uniform"},
    }
    classifier["optim"] = {"classifier": classifier["optim"]["denoiser"]}
    classifier["guidance"] = {}
    held_out = {"name": "denoising_loss", "num_batches": 1, "batch_size": 16}
    classifier["evals"] = {"held_out": held_out}
    configs = {
        "zero": smoke("mixture", "train.num_steps=0"),
        "trained": smoke("mixture"),
        "exact": smoke(
            "mixture", "networks={'denoiser': {'name': 'gaussian_mixture'}}"
        ),
        "classifier": config_lib.resolve(classifier),
    }
    top = tmp_path_factory.mktemp("references")
    for name, steps in (("zero", [0]), ("trained", [5, 10]), ("classifier", [10])):
        save(configs[name], top / name, steps)
    return {name: (top / name, config) for name, config in configs.items()}


def save(config, folder, steps):
    """A run directory without the training: each step moves the parameters by waves."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    built = experiment.build(config)
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        start = state_lib.init(built, mesh)
        checkpoints = Checkpoints(folder, built.checkpoint)
        for step in steps:
            at = lambda size, p, s=step: jax.device_put(  # noqa: E731
                np.asarray(p) + size * np.sin(s * np.arange(p.size)).reshape(p.shape),
                p.sharding,
            )
            params = jax.tree.map(functools.partial(at, 0.1), start.params)
            ema = jax.tree.map(functools.partial(at, 0.2), start.ema)
            state = start.replace(params=params, ema=ema)
            checkpoints.save(step, state, {"none": np.zeros(1)}, {}, {"step": step})
        checkpoints.close()


@pytest.fixture
def guided(folders):
    """`guided(name, **blocks)`: an experiment of that run with this guidance."""

    def make(name, mesh=None, **blocks):
        config = {**folders[name][1], "guidance": blocks}
        config |= {"mesh": {**config["mesh"], **mesh}} if mesh else {}
        return experiment.build(config_lib.resolve(config))

    return make


def started(built, mesh):
    return restore.of_state(built, state_lib.init(built, mesh), "none")


def params_of(built, folder, mesh, step=10, name="none"):
    return restore.restore(built, Checkpoints(folder), step, name, mesh)


def auto(folders, **changes):
    reference = str(folders["zero"][0])
    return {"autoguidance": {"reference": reference, "guidance_scale": 3.0, **changes}}


def noisy():
    z_t = jax.random.normal(jax.random.key(0), (8, 2))
    return z_t, jnp.linspace(0.1, 0.9, 8), {"label": EVERY_CLASS}


def test_autoguidance_extrapolates_from_the_restored_reference(folders, guided):
    built = guided("exact", **auto(folders))
    mesh = sharding.make_mesh(built.mesh)
    z_t, t, cond = noisy()
    with jax.set_mesh(mesh):
        params = started(built, mesh)
        predict = jax.jit(inference.make_predict(built))
        found = predict(params, z_t, t, cond)
        own = jax.jit(built.objective.predict)(params, z_t, t, cond)
        # The reference is an argument of the compiled program, and no part of it.
        other = jax.tree.map(lambda p: p + 0.1, params[restore.REFERENCES])
        moved = predict({**params, restore.REFERENCES: other}, z_t, t, cond)
    alpha, sigma = (q[:, None] for q in built.process.schedule.alpha_sigma(t))
    for q, a, weak in zip(found, own, (alpha * z_t, sigma * z_t), strict=True):
        np.testing.assert_allclose(q, 3 * a - 2 * weak, rtol=1e-5, atol=1e-5)
    assert np.abs(moved.x - found.x).max() > 1e-3
    assert predict._cache_size() == 1


def test_classifier_guidance_follows_the_restored_classifier(folders, guided):
    block = {"reference": str(folders["classifier"][0]), "classifier_scale": 2.0}
    built = guided("exact", classifier=block | {"ema": "none"})
    mesh = sharding.make_mesh(built.mesh)
    z_t, t, cond = noisy()
    other = built.references[0].experiment
    with jax.set_mesh(mesh):
        params = started(built, mesh)
        theirs = params_of(other, folders["classifier"][0], mesh)
        compute = inference.make_compute(built, mesh)
        ask = lambda predict, z, t, label: predict(z, t, {"label": label})  # noqa: E731
        found, own = (
            compute(params, ask, z_t, t, EVERY_CLASS, guided=g) for g in (True, False)
        )

        def slope(z):
            return jnp.trace(other.objective.log_probs(theirs, z, t, {}))

        gradient = jax.jit(jax.grad(slope))(z_t)
    alpha, sigma = (q[:, None] for q in built.process.schedule.alpha_sigma(t))
    assert np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(
        found.eps - own.eps, -2 * sigma * gradient, rtol=1e-3, atol=1e-6
    )
    step = 2 * sigma**2 / alpha * gradient
    np.testing.assert_allclose(found.x - own.x, step, rtol=1e-3, atol=1e-6)


def test_the_reference_lies_on_the_mesh_of_the_run(folders, guided):
    block = auto(folders, reference=str(folders["trained"][0]))
    built = guided("trained", mesh={"data": 4, "fsdp": 2}, **block)
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        params = params_of(built, folders["trained"][0], mesh, name="main")
        leaves = jax.tree.leaves(params[restore.REFERENCES])
        assert leaves and all(leaf.sharding.mesh == mesh for leaf in leaves)
        assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
        # The run itself as its reference, the same step and average: no guidance.
        draw = inference.make_draw(built, mesh)
        found = draw(params, 0, EVERY_CLASS, EVERY_CLASS)
        plain = inference.make_draw(
            guided("trained", mesh={"data": 4, "fsdp": 2}), mesh
        )
        expected = plain(params, 0, EVERY_CLASS, EVERY_CLASS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_step_and_average_of_the_reference_are_chosen(folders, guided):
    own = str(folders["trained"][0])
    stored = {}
    for step, name in ((5, "none"), (10, "none"), (10, "main"), (None, "")):
        built = guided("exact", **auto(folders, reference=own, step=step, ema=name))
        mesh = sharding.make_mesh(built.mesh)
        with jax.set_mesh(mesh):
            (part,) = restore.of_references(built, mesh)[restore.REFERENCES]
        stored[step, name] = np.asarray(jax.tree.leaves(part)[-1])
    np.testing.assert_array_equal(stored[None, ""], stored[10, "main"])
    assert len({v.tobytes() for v in stored.values()}) == 3


def test_training_reads_no_reference_and_pictures_read_it_once(
    folders, guided, monkeypatch, tmp_path
):
    read, calls = restore._of_reference, []

    def counted(reference, *arguments):
        calls.append(reference)
        return read(reference, *arguments)

    monkeypatch.setattr(restore, "_of_reference", counted)
    config = {**folders["trained"][1], "guidance": auto(folders)}
    config = config_lib.resolve(config)
    fewer = {**config, "train": {**config["train"], "num_steps": 1}}
    assert train.train(fewer, tmp_path / "bare") == train.DONE
    assert not calls
    built = experiment.build(config)
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        state = state_lib.init(built, mesh)
        for _ in range(2):
            params = restore.of_state(built, state, "main")
    assert set(params) == {"denoiser", restore.REFERENCES}
    assert len(calls) == 1


def test_an_average_out_of_reach_is_an_error_of_the_reference(
    folders, guided, monkeypatch
):
    built = guided("exact", **auto(folders))
    (reference,) = built.references
    power = {"main": ema.Power(sigma_rel=0.1)}
    other = dataclasses.replace(reference.experiment, ema=power)
    reference = reference._replace(experiment=other, ema="sigma_rel=0.2")
    built = dataclasses.replace(built, references=(reference,))
    mesh = sharding.make_mesh(built.mesh)
    said = "^config.guidance.autoguidance.ema: role 'denoiser', "
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        restore.of_references(built, mesh)


def test_mistakes_seen_while_tracing_are_one_line(
    folders, tmp_path, monkeypatch, capsys
):
    """Noise on the label of a network that has no embedding of it; nothing to draw."""
    exact = tmp_path / "exact"
    save(folders["exact"][1], exact, [1])
    noise = "--config.guidance.cads={'noise_scale': 1.0}"
    classifier = folders["classifier"][0]
    for words, said in (
        ([f"--workdir={exact}", noise], "config.guidance.cads: the network does not"),
        ([f"--workdir={classifier}"], "has nothing to sample; such a run"),
    ):
        words = [*words, "--mode=sample", "--num_samples=8", f"--out={tmp_path}/x"]
        monkeypatch.setattr("sys.argv", ["diffusionlab", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("diffusionlab: error: ") and said in line


def test_the_program_samples_with_guidance_given_as_a_flag(folders, tmp_path):
    folder = folders["trained"][0]
    words = [f"--workdir={folder}", "--mode=sample", "--num_samples=8"]
    flags = {
        "auto": [f"--config.guidance.autoguidance={auto(folders)['autoguidance']}"],
        "cads": ["--config.guidance.cads={'noise_scale': 1.0, 'rescale': 0.0}"],
    }
    found = {}
    for name, more in flags.items():
        out = tmp_path / name
        assert main.run([*words, *more, f"--out={out}", "--batch_size=8"]) == 0
        found[name] = np.load(out / "samples.npz")["x"]
    assert not np.array_equal(found["auto"], found["cads"])
    assert all(np.isfinite(x).all() for x in found.values())
    job = json.loads((tmp_path / "auto" / "job.json").read_text())
    assert "reference" in job["guidance"]["autoguidance"]
    # None of classifier-free guidance, and the newest of the run that is named.
    assert job["reference_steps"] == [None, 0]


def test_annealed_samples_depend_on_their_own_index_alone(folders, guided):
    built = guided("trained", cads={"noise_scale": 1.0, "rescale": 0.0, "tau_1": 0.1})
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        params = params_of(built, folders["trained"][0], mesh, name="main")
        draw = inference.make_draw(built, mesh)
        whole = draw(params, 0, EVERY_CLASS, EVERY_CLASS)
        turned = draw(params, 0, EVERY_CLASS[::-1], EVERY_CLASS[::-1])
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-5, atol=1e-6)


def test_an_exact_network_refuses_noise_on_its_label(folders, guided):
    built = guided("exact", cads={})
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="does not embed its la"):
        jax.eval_shape(
            inference.make_predict(built),
            state_lib.abstract_params(built),
            *noisy()[:2],
            {"label": EVERY_CLASS, "key": jax.random.split(jax.random.key(0), 8)},
        )


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"reference": "/no/such/run"},
            FileNotFoundError,
            "autoguidance.reference: '/no/such/run' holds no run",
        ),
        (
            {"step": 7},
            ValueError,
            r"autoguidance.step: no checkpoint of step 7 .*\[0\]",
        ),
        (
            {"ema": "mian"},
            ValueError,
            "autoguidance.ema: no average 'mian'; .*: main, none; or sigma_rel",
        ),
        (
            {"ema": "sigma_rel=0.1"},
            ValueError,
            "autoguidance.ema: 'sigma_rel=0.1' is reconstructed from an average 'pow",
        ),
        (
            {"ema": "sigma_rel=wide"},
            ValueError,
            "autoguidance.ema: expected sigma_rel=WIDTH with a number",
        ),
        (
            {"reference": "classifier"},
            ValueError,
            "'noisy_classification', which has no 'predict'.*: denoising",
        ),
    ],
)
def test_a_reference_that_cannot_be_used_is_named(
    folders, guided, changes, error, said
):
    if changes.get("reference") in folders:
        changes = {"reference": str(folders[changes["reference"]][0])}
    with pytest.raises(error, match=f"^config.guidance.*{said}"):
        guided("exact", **auto(folders, **changes))
    # Where it is off, nobody looks.
    built = guided("exact", **auto(folders, **changes, **{"guidance_scale": 1.0}))
    assert built.references == (None,)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "process.schedule={'name': 'flow'}",
            "another process.schedule: Cosine.* Flow",
        ),
        ("data.source.dimension=3", r"another shape of the data: \(2,\) there, \(3,\)"),
        ("data.source.num_components=6", "another number of classes: 8 there, 6 here"),
    ],
)
def test_a_reference_under_which_z_t_differs_is_refused(folders, smoke, override, said):
    config = smoke("mixture", override)
    config["guidance"] = auto(folders)
    with pytest.raises(ValueError, match=f"autoguidance.reference: .* has {said}"):
        experiment.build(config_lib.resolve(config))


def test_another_prediction_type_is_fine(folders, smoke):
    config = smoke("mixture", "process.prediction=eps")
    config["guidance"] = auto(folders)
    assert experiment.build(config_lib.resolve(config)).references[0].step is None


def test_a_denoiser_is_no_classifier(folders, guided):
    block = {"reference": str(folders["zero"][0]), "classifier_scale": 1.0}
    with pytest.raises(ValueError, match="'denoising', which has no 'log_probs'"):
        guided("exact", classifier=block)


def test_a_result_says_at_which_step_the_reference_was_used(folders):
    folder = folders["trained"][0]
    block = auto(folders, reference=str(folder))["autoguidance"]
    evals = {"points": {"name": "mixture", "num_samples": 8}}
    words = [f"--workdir={folder}", "--mode=eval", f"--config.evals={evals}"]
    assert main.run([*words, f"--config.guidance={{'autoguidance': {block}}}"]) == 0
    (file,) = (folder / "evals").glob("step_00000010_sampler-*_points.json")
    record = json.loads(file.read_text())
    assert record["guidance"]["autoguidance"]["step"] is None
    assert record["reference_steps"] == {"config.guidance.autoguidance": 10}


def test_a_classifier_is_evaluated_and_not_sampled(folders, tmp_path):
    folder, config = folders["classifier"]
    assert main.run([f"--workdir={folder}", "--mode=eval"]) == 0
    file = folder / "evals" / "step_00000010_held_out.json"
    numbers = json.loads(file.read_text())["numbers"]
    assert 0 <= numbers["accuracy"] <= 1 and numbers["loss"] > 0
    said = "config.objective: 'noisy_classification' has nothing to sample"
    with pytest.raises(ValueError, match=said):
        words = [f"--workdir={folder}", "--mode=sample", "--num_samples=4"]
        main.run([*words, f"--out={tmp_path}/x"])
    built = experiment.build(config)
    mesh = sharding.make_mesh(built.mesh)
    with pytest.raises(ValueError, match=said):
        inference.make_plain_predict(built, mesh)({}, *noisy()[:2], EVERY_CLASS)
    config = {**config, "logging": {**config["logging"], "samples_every": 5}}
    with pytest.raises(ValueError, match="config.logging.samples_every: is 5, and the"):
        experiment.build(config)
