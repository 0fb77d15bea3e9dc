"""A metric that is not finite stops the run, and says which and when."""

import sys
import textwrap

import jax
import pytest

from diffusionlab import main, train

OBJECTIVE = """
    import jax.numpy as jnp

    from diffusionlab.objectives import denoising, weightings
    from diffusionlab.schedules import times


    def nan_at(process, networks, spec, bad_step: int):
        class Bad(denoising.Denoising):
            def loss(self, params, inputs):
                loss, metrics = super().loss(params, inputs)
                factor = jnp.where(inputs.step + 1 == bad_step, jnp.nan, 1.0)
                total, count = metrics["loss"]
                return loss * factor, {**metrics, "loss": (total * factor, count)}

        return Bad(
            process=process,
            networks=networks,
            spec=spec,
            weighting=weightings.Eps(),
            times=times.Uniform(),
        )
"""


@pytest.mark.parametrize("every", [2, 100])
def test_a_loss_that_is_not_finite_stops_the_run(
    flags, rows, steps_of, contents, smoke, every, tmp_path, monkeypatch, capsys
):
    """Found at the next row, or, where rows are rare, before the next save."""
    (tmp_path / "bad_objective.py").write_text(textwrap.dedent(OBJECTIVE))
    monkeypatch.syspath_prepend(tmp_path)
    overrides = (
        "objective={'name': 'bad_objective:nan_at', 'bad_step': 7}",
        "checkpoint.every=3",
        f"logging.every={every}",
    )
    folder = tmp_path / "run"
    words = [*flags("mixture", folder, *overrides), f"--plugins={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["diffusionlab", *words])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "diffusionlab: error: step 7: " in said
    assert "train/loss" in said
    assert "[3, 6]" in said
    assert steps_of(folder) == [3, 6]
    found = contents(smoke("mixture", *overrides), folder, 6)
    assert all(jax.numpy.isfinite(v).all() for k, v in found.items() if "params" in k)
    assert [row["step"] for row in rows(folder)] == ([2, 4, 6] if every == 2 else [])


def test_a_learning_rate_that_diverges_stops_the_run(smoke, tmp_path):
    config = smoke(
        "mixture",
        "optim.denoiser.name='sgd'",
        "optim.denoiser.clip_norm=0",
        "optim.denoiser.learning_rate={'name': 'constant', 'value': 1e30}",
        "checkpoint.every=1",
    )
    with pytest.raises(train.NonFiniteError, match=r"step [2-9]: train/.*not finite"):
        train.train(config, tmp_path / "run")
