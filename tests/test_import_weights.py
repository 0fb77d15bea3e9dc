"""Weights from elsewhere: a run of them, and one line for a file that does not fit."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from diffusionlab import config as config_lib
from diffusionlab import experiment as experiment_lib
from diffusionlab import import_weights, main, restore, sharding, workdir
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.features import weights
from diffusionlab.models import imports

sys.path.append(str(pathlib.Path(__file__).parent / "models"))
import published_dit

# Those of the config's smoke variant.
SIZES = dict(patch_size=2, width=32, num_layers=2, num_heads=2)
SHAPE, CLASSES = (8, 8, 4), 4
CONFIG = "configs/imagenet_latents/denoising.py:smoke"
BARE = (
    "logging.samples_every=0",
    "evals={}",
    "logging.tensorboard=False",
    "sampler.num_steps=2",
)


def random_state(**changes):
    return published_dit.state(shape=SHAPE, classes=CLASSES, **{**SIZES, **changes})


@pytest.fixture(scope="module")
def words(root):
    flags = [f"--config={root}/{CONFIG}", *(f"--config.{o}" for o in BARE)]

    def make(file, folder, *more):
        return [
            "--mode=import", f"--weights={file}", f"--workdir={folder}", *flags, *more
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def imported(words, tmp_path_factory):
    """A run of a safetensors file, and the arrays that were in it."""
    folder = tmp_path_factory.mktemp("imported")
    arrays = random_state()
    safetensors_numpy.save_file(arrays, folder / "w.safetensors")
    assert main.run(words(folder / "w.safetensors", folder / "run")) == 0
    return folder / "run", arrays, folder / "w.safetensors"


def parameters(folder, average):
    built = experiment_lib.build(workdir.read_config(folder))
    mesh = sharding.make_mesh(built.mesh)
    return built, restore.restore(built, Checkpoints(folder), 0, average, mesh)


@pytest.mark.parametrize("average", ["none", "main"])
def test_a_run_of_them_answers_as_the_published_network(imported, average):
    folder, arrays, _ = imported
    built, params = parameters(folder, average)
    z = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    step, label = np.array([0, 700]), np.array([3, CLASSES])
    predict = jax.jit(built.objective.predict)
    eps = predict(params, z, np.float32(step / 999), {"label": label}).eps
    for i in range(2):
        expected = published_dit.forward(
            arrays, z[i].transpose(2, 0, 1), step[i], label[i], **SIZES
        )
        expected = expected.transpose(1, 2, 0)
        np.testing.assert_allclose(eps[i], expected, atol=3e-4, rtol=1e-4)


def test_where_they_are_from_is_on_record(imported):
    folder, arrays, file = imported
    record = json.loads((folder / import_weights.RECORD).read_text())
    assert record["sha256"] == weights.sha256(file) and record["file"] == str(file)
    assert record["architecture"] == "peebles_dit"
    # Without the variance of 16 numbers a token, and the fixed positions.
    dropped = 16 * (SIZES["width"] + 1) + arrays["pos_embed"].size
    total = sum(a.size for a in arrays.values())
    assert record["parameters"] == total - dropped
    assert workdir.saved_steps(folder) == [0]


def test_an_imported_run_can_be_sampled_and_trained(imported, capsys):
    folder, *_ = imported
    drawing = ["--mode=sample", "--num_samples=8", "--batch_size=8"]
    assert main.run([*drawing, f"--workdir={folder}"]) == 0
    (job,) = (folder / "samples").iterdir()
    assert np.load(job / "samples.npz")["x"].shape == (8, *SHAPE)
    assert (job / "samples.png").is_file()
    more = [f"--workdir={folder}", "--config.train.num_steps=2"]
    assert main.run(more) == 0
    assert "resumed from step 0" in capsys.readouterr().out


def test_an_imported_run_can_be_a_teacher(imported, root):
    config = config_lib.load(f"{root}/configs/distillation/reflow.py:smoke")
    config_lib.override(config, [f"teacher={imported[0]}", "evals={}"])
    from diffusionlab import inherit

    inherit.inherit(config)
    built = experiment_lib.build(config_lib.resolve(config))
    assert built.teacher.process.prediction == "eps"
    assert built.config["networks"]["denoiser"]["name"] == "peebles_dit"


def test_a_run_is_never_written_over(imported, words):
    folder, _, file = imported
    with pytest.raises(workdir.WorkdirError, match="holds a run with checkpoints"):
        main.run(words(file, folder))


def change(arrays, **changes):
    kept = {n: a for n, a in arrays.items() if changes.get(n, 0) is not None}
    return kept | {n: a for n, a in changes.items() if a is not None}


QKV, BIAS = "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {QKV: None, BIAS: None},
            rf"2 missing .the first is '{BIAS}' \[128\]",
        ),
        ({"head.weight": np.ones(3)}, r"1 unknown .the first is 'head.weight' \[3\]"),
        (
            {QKV: np.ones((96, 16))},
            rf"1 of another shape .the first is '{QKV}' \[96, 16\], here \[96, 32\]",
        ),
        ({BIAS: np.full(128, np.nan)}, f"'{BIAS}' has values that are not finite"),
        ({"pos_embed": np.ones((1, 16, 32))}, "'pos_embed' is not the constant"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_written(
    changes, message, words, tmp_path
):
    arrays = change(random_state(), **changes)
    np.savez(tmp_path / "w.npz", **{n: np.float32(a) for n, a in arrays.items()})
    with pytest.raises(ValueError, match=f"^--weights: .*{message}"):
        main.run(words(tmp_path / "w.npz", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.networks.denoiser.num_layers=3"], "--weights: .* 10 missing"),
        (["--config.networks.denoiser.conditions=('s',)"], "config.networks: 2 param"),
        (["--config.networks={'denoiser': {'name': 'dit'}}"],
         "config.networks.denoiser.name: no weights .* 'dit'; .* peebles_dit"),
    ],
)  # fmt: skip
def test_another_network_is_refused(more, message, imported, words, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        main.run(words(imported[2], tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_positions_may_be_left_out_of_a_file():
    arrays = change(random_state(), pos_embed=None)
    entries = {"pos_embed": imports.Entry((1, 16, 32), optional=True)}
    import_weights.check({}, entries, "file")
    assert "pos_embed" not in arrays


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mode=import", "--workdir={d}", "--config=" + CONFIG], "--weights: miss"),
        (["--weights=x.npz", "--workdir={d}", "--config=" + CONFIG], "--weights: goes"),
        (["--mode=import", "--weights=x.npz", "--workdir={d}"], "--config: missing"),
        (["--mode=import", "--weights=x.npz", "--config=" + CONFIG], "--workdir: miss"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(args, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        main.run([word.replace("{d}", str(tmp_path / "run")) for word in args])
