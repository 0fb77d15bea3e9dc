"""A sampler from outside the package: one file, and its name in the config."""

import textwrap

import numpy as np
import pytest

from diffusionlab import registry

SAMPLER = '''
    """Deterministic, with a step that ends early."""

    import dataclasses

    from diffusionlab.samplers import base


    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MySampler:
        num_steps: int
        grid: object = None
        shift: float = 0.0

        times, init = base.times, base.init
        num_evaluations = base.one_per_step

        def step(self, process, predict, state, t, s, keys):
            prediction = predict(state.z, t)
            return base.State(process.mix(*prediction, s), prediction.x)

        def final(self, state):
            return state.x + self.shift
'''


@pytest.fixture
def plugins(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_sampler.py").write_text(textwrap.dedent(SAMPLER))
    return folder


def test_a_sampler_of_mine_trains_and_samples(
    program, programs, root, plugins, tmp_path
):
    run = tmp_path / "run"
    block = "{'name': 'my_sampler:MySampler', 'num_steps': 4, 'shift': 100.0}"
    named = [f"--plugins={plugins}", f"--config.sampler={block}"]
    config = f"--config={root}/configs/mixture/denoising.py:smoke"
    theirs = "--config.sampler={'name': 'ddim', 'num_steps': 4}"
    # The run knows its sampler; where its file lies, the flag has to say again.
    words = [f"--workdir={run}", "--mode=sample", "--num_samples=8"]
    programs(
        [
            [config, f"--workdir={run}", *named],
            [*words, named[0], f"--out={tmp_path / 'mine_out'}"],
            [*words, named[0], f"--out={tmp_path / 'out'}", theirs],
        ]
    )
    assert (run / "samples" / "step_00000010.png").is_file()
    found = np.load(tmp_path / "mine_out" / "samples.npz")["x"]
    ddim = np.load(tmp_path / "out" / "samples.npz")["x"]
    np.testing.assert_allclose(found, ddim + 100, rtol=1e-6)

    done = program(*words, f"--out={tmp_path / 'lost'}", check=False)
    assert done.returncode == 1
    assert "there is no module 'my_sampler'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_keyword_of_it_is_named(plugins, monkeypatch):
    monkeypatch.syspath_prepend(plugins)
    block = {"name": "my_sampler:MySampler", "num_steps": 4, "shfit": 1.0}
    with pytest.raises(ValueError, match="sampler.shfit.*did you mean 'shift'"):
        registry.check("sampler", block, "config.sampler")
