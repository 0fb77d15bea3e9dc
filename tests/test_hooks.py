"""The profiler's window, what TensorBoard is told, and a save before an error."""

import jax
import pytest

from diffusionlab import hooks, main, train


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


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_is_told_whatever_becomes_of_the_save(
    processes, monkeypatch, capsys
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    called, alone = [], False

    def save(step):
        called.append(step)
        raise OSError("the disk is full")

    def meet(where):
        called.append((where, capsys.readouterr().err))
        if alone:
            raise RuntimeError("the others never came")

    def fail(step, is_due):
        error = f"not finite at {step}"
        with (
            pytest.raises(ValueError, match=error),
            hooks.saving_first(save, step, is_due, meet),
        ):
            raise ValueError(error)

    fail(5, True)
    # Of several processes the wait for the others may be the last thing of this one.
    said = "process 0/2: not finite at 5\n" if processes == 2 else ""
    assert called == [("an error at step 5", said), 5]
    alone = True
    fail(5, True)
    assert called[2:] == called[:1], "what the others do not save is not saved"
    called.clear()
    fail(6, False)
    with hooks.saving_first(save, 7, True, meet):
        pass
    assert not called
