import builtins
import json
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from diffusionlab import writers


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    """What TensorBoard's own reader finds."""
    reader = event_accumulator.EventAccumulator(
        str(folder), {event_accumulator.IMAGES: 0}
    )
    reader.Reload()
    return reader


def test_rows_are_valid_json_whatever_the_value(tmp_path):
    with_all = {
        "a": jnp.float32(0.5),
        "b": np.nan,
        "c": [1, np.inf],
        "d": jnp.arange(2),
    }
    writer = writers.open_writers(tmp_path, tensorboard=False)
    writer.scalars(3, with_all)
    writer.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 3, "a": 0.5, "b": "nan", "c": [1, "inf"], "d": [0, 1]}


def test_a_row_is_in_the_file_at_once(tmp_path):
    file = writers.MetricsFile(tmp_path / "metrics.jsonl")
    file.scalars(1, {"a": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
    file.close()


def test_resuming_leaves_no_duplicate_row_and_repairs_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "a": 1.0}\n{"step": 20, "a": 2.0}\n{"step": 30, "a"')
    assert [row["step"] for row in writers.read_rows(path)] == [10, 20]
    writer = writers.open_writers(tmp_path, step=10, tensorboard=False)
    writer.scalars(20, {"a": 5.0})
    writer.close()
    assert rows(path) == [{"step": 10, "a": 1.0}, {"step": 20, "a": 5.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damage_within_the_file_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"st\n{"step": 30}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        writers.open_writers(tmp_path, step=30)
    assert path.read_text().count("\n") == 3, "nothing is thrown away"


def test_tensorboard_reads_back_scalars_images_and_text(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    writer = writers.open_writers(tmp_path)
    writer.text(0, "config", '{\n  "seed": 0\n}')
    writer.text(20, "samples", "[0]\na")
    writer.scalars(1, {"train/loss": 0.5, "train/by": [1.0, 2.0]})
    writer.scalars(2, {"train/loss": 0.25})
    writer.image(2, "samples", picture)
    writer.close()
    found = events(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert found.Scalars("train/by/1")[0].value == 2
    (image,) = found.Images("samples")
    assert (image.step, image.height, image.width) == (2, 6, 9)
    assert image.encoded_image_string.startswith(b"\x89PNG")
    (event,) = found.Tensors("samples/text_summary")
    assert event.step == 20 and b"    [0]" in event.tensor_proto.string_val[0]
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b'"seed": 0' in text


def test_tensorboard_forgets_what_a_resumed_run_writes_again(tmp_path):
    first = writers.open_writers(tmp_path)
    for step in (1, 2, 3):
        first.scalars(step, {"a": step})
    first.close()
    second = writers.open_writers(tmp_path, step=1)
    second.scalars(2, {"a": 20})
    second.close()
    found = events(tmp_path / "tensorboard").Scalars("a")
    assert [(e.step, e.value) for e in found] == [(1, 1), (2, 20)]


def test_other_processes_write_nothing(tmp_path):
    writer = writers.open_writers(tmp_path, process_index=1, wandb="p")
    writer.scalars(1, {"a": 1})
    writer.image(1, "a", np.zeros((1, 1, 3), np.uint8))
    writer.text(0, "a", "b")
    writer.flush()
    writer.close()
    assert not list(tmp_path.iterdir())


class Recorder:
    """Writes to a list; waits for the gate, and fails at step 13."""

    def __init__(self):
        self.gate, self.steps, self.closed = threading.Event(), [], False

    def scalars(self, step, values):
        self.gate.wait(10)
        if step == 13:
            raise OSError("disk is full")
        self.steps.append((step, threading.current_thread().name))

    def flush(self): ...

    def close(self):
        self.closed = True


def test_writing_does_not_block_the_caller_and_keeps_the_order():
    recorder = Recorder()
    writer = writers.Writers([recorder])
    for step in range(5):
        writer.scalars(step, {})
    assert not recorder.steps, "the caller went on while the writer waited"
    recorder.gate.set()
    writer.flush()
    assert [step for step, _ in recorder.steps] == list(range(5))
    assert all(name.startswith("writers") for _, name in recorder.steps)
    writer.close()
    writer.close()
    assert recorder.closed


def test_an_error_of_the_thread_is_raised_in_the_loop():
    recorder = Recorder()
    recorder.gate.set()
    writer = writers.Writers([recorder])
    writer.scalars(13, {})
    with pytest.raises(OSError, match="disk is full"):
        writer.flush()
    writer.scalars(13, {})
    with pytest.raises(OSError, match="disk is full"):
        writer.close()
    assert recorder.closed


def test_a_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        writers.WandB("project", tmp_path)


def test_wandb_writes_offline_and_resumes_under_the_same_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        writer = writers.open_writers(
            tmp_path, step=step - 1, tensorboard=False, wandb="p", config={"seed": 0}
        )
        writer.scalars(step, {"train/loss": 1 / step})
        writer.image(step, "samples", np.zeros((8, 8, 3), np.uint8))
        writer.text(0, "config", "text")
        writer.close()
    folder = tmp_path / "wandb"
    run_id = (folder / "run_id.txt").read_text().strip()
    logs = list(folder.rglob(f"run-{run_id}.wandb"))
    assert logs and all(log.stat().st_size > 0 for log in logs)
    assert list(folder.rglob("*.png")), "the picture is stored"
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


def test_neither_tensorboard_nor_wandb_is_imported_before_it_is_used():
    import subprocess

    program = (
        "import sys, diffusionlab.writers; "
        "sys.exit(bool({'tensorboardX', 'tensorboard', 'wandb'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
