"""The main job, for real: what it promises, measured by itself."""

import json

import pytest


@pytest.mark.slow
@pytest.mark.xdist_group("digits")
def test_the_digits_run_reaches_its_quality(digits_run):
    numbers = json.loads((digits_run / "result.json").read_text())["numbers"]
    found = {k.removeprefix("eval/samples/"): v for k, v in numbers.items()}
    assert found["agreement_real"] >= 0.97
    assert found["agreement"] >= 0.97
    assert found["precision"] >= 0.8
    assert found["recall"] >= 0.8
    assert found["precision_real"] == pytest.approx(0.97, abs=0.02)
    # Not copies: samples are no nearer to training digits than held-out digits are.
    assert found["nearest_train_ratio"] > 0.9
    assert found["too_close"] < 0.05
    pictures = [p.name for p in (digits_run / "evals").glob("*.png")]
    assert "step_00001200_samples_classes.png" in pictures
    assert (digits_run / "report.html").stat().st_size > 10_000
