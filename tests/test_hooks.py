"""The profiler's window, and what TensorBoard is told of the config."""

import pytest

from diffusionlab import main, train


@pytest.fixture
def run(root, tmp_path):
    def start(*overrides):
        words = [f"--config={root}/configs/mixture/denoising.py:smoke"]
        words += [f"--workdir={tmp_path / 'run'}", "--config.evals={}"]
        words += ["--config.logging.samples_every=0", *overrides]
        assert main.run(words) == train.DONE
        return tmp_path / "run"

    return start


@pytest.mark.parametrize("first, count", [(0, 3), (8, 50)])
def test_profile_covers_its_window_also_at_the_ends_of_a_run(run, first, count):
    folder = run(
        f"--config.logging.profile_from={first}",
        f"--config.logging.profile_steps={count}",
    )
    assert list(folder.glob("profile/**/*.xplane.pb"))


def test_tensorboard_has_the_config_of_the_run_and_no_profile_unless_asked(run):
    from tensorboard.backend.event_processing import event_accumulator

    folder = run()
    assert not (folder / "profile").exists()
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (tag,) = [t for t in events.Tags()["tensors"] if t.startswith("config")]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "num_steps: 10" in text
