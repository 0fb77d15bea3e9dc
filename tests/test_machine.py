import importlib.metadata
import json
import subprocess

import jax
import pytest

from diffusionlab import machine, revision


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    "kind, rate",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
    ],
)
def test_datasheet_rate_is_that_of_the_longest_name(monkeypatch, kind, rate):
    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)])
    assert machine.datasheet_rate() == rate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrix_rate_counts_two_operations_per_product(monkeypatch, dtype):
    now = [0.0]

    def tick():
        # Each reading is 8 ms later than the one before.
        now[0] += 0.008
        return now[0]

    monkeypatch.setattr(machine.time, "perf_counter", tick)
    rate = machine.matrix_rate(dtype, size=32)
    # At 8 and 16 ms a product, at 24 ms no more, and the last reading is at 32 ms.
    assert rate == pytest.approx(2 * 32**3 / 0.016)


def test_measured_rates_are_those_of_a_machine(tmp_path):
    assert 1e6 < machine.matrix_rate(size=128) < 1e16
    assert 1e4 < machine.disk_rate(tmp_path, megabytes=1) < 1e12
    assert list(tmp_path.iterdir()) == []


def test_versions_are_those_installed():
    found = machine.versions()
    assert found["jax"] == jax.__version__
    assert found["flax"] == importlib.metadata.version("flax")
    assert found["python"].startswith("3.")


def test_revision_is_that_of_the_code_wherever_one_stands(monkeypatch, tmp_path, root):
    monkeypatch.chdir(tmp_path)
    asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    expected = done.stdout.strip() if done.returncode == 0 else ""
    assert revision.git_revision().removesuffix("+changes") == expected


def test_revision_without_git_is_empty(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(revision.subprocess, "run", missing)
    assert revision.git_revision() == ""


def test_environment_survives_json_and_names_the_devices():
    record = machine.environment()
    assert json.loads(json.dumps(record)) == record
    assert record["device_count"] == 8 and record["backend"] == "cpu"
    assert record["process_count"] == 1 and record["versions"] == machine.versions()
