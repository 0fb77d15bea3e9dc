"""A second start of a run compiles nothing; the flag turns the cache off."""

import re

import pytest


def _files(folder):
    return {p.name for p in folder.rglob("*-cache")}


def _seconds(done):
    return float(re.search(r"first step done ([\d.]+) s after", done.stdout)[1])


@pytest.fixture
def start(program, root, tmp_path):
    """`start(name, cache, *flags)`: in a fresh process."""

    def run(name, cache, *more):
        config = f"{root}/configs/mixture/denoising.py:smoke"
        words = [f"--config={config}", f"--workdir={tmp_path / name}"]
        return program(
            *words,
            *more,
            f"--compilation_cache={cache}",
            optimised=True,
            # A folder 'off', if one is made, is then in tmp_path.
            cwd=tmp_path,
            env={
                "JAX_LOG_COMPILES": "0",
                "JAX_COMPILATION_CACHE_DIR": "",
                "PYTHONPATH": str(root),
            },
        )

    return run


@pytest.mark.slow
def test_a_second_start_compiles_nothing(start, tmp_path):
    cache = tmp_path / "cache"
    first = start("first", cache)
    compiled = _files(cache)
    assert any("jit_step" in name for name in compiled)
    second = start("second", cache)
    assert _files(cache) == compiled
    # What is left is imports, tracing and reading; how much that is, is the machine's.
    assert _seconds(second) < _seconds(first)


def test_off_writes_nothing(start, tmp_path):
    start("run", "off", "--config.evals={}", "--config.logging.samples_every=0")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "off").exists()
