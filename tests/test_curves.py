import json

import pytest

from diffusionlab import curves


def test_metrics_and_evaluations_meet_under_one_name():
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "eval/a/b": 1.0}]
    evals = [{"step": 4, "evaluator": "a", "numbers": {"b": 3.0}}]
    found = curves.collect(rows, evals)
    assert found == {"train/loss": {1: 2.0}, "eval/a/b": {2: 1.0, 4: 3.0}}


def test_a_reference_is_a_line_of_the_same_chart():
    found = {
        "eval/s/recall_real": {1: 0.9, 2: 0.9},
        "eval/s/recall": {1: 0.1, 2: 0.2},
        "eval/s/accuracy/0": {1: 0.1, 2: 0.2},
        "eval/s/accuracy/1": {1: 0.1, 2: 0.2},
        "eval/s/once": {1: 0.1},
        "train/loss": {1: 0.1, 2: 0.2},
    }
    charts = curves.charts(found)
    lines = {c["title"]: [s["name"] for s in c["series"]] for c in charts}
    assert lines == {
        "train/loss": ["this run"],
        "eval/s/recall": ["real data", "this run"],
        "eval/s/accuracy": ["0", "1"],
    }
    assert charts[0]["title"] == "train/loss" and charts[0]["log"]


def test_a_value_that_is_no_number_is_a_gap():
    (chart,) = curves.charts({"train/loss": {1: 1.0, 2: "nan", 3: 3.0}})
    assert chart["series"][0]["points"] == [[1, 1.0], [2, None], [3, 3.0]]
    json.dumps(chart, allow_nan=False)


def test_long_curves_are_averaged():
    (chart,) = curves.charts({"a": {step: step % 2 for step in range(100_000)}})
    points = chart["series"][0]["points"]
    assert len(points) == 600 and points[-1][0] == 99_999
    assert all(value == pytest.approx(0.5, abs=0.01) for _, value in points)


def test_levels_come_from_vectors_and_from_names():
    found = {
        "train/loss_by_logsnr": {5: [1.0, "nan", 3.0]},
        "eval/d/loss_by_logsnr/-13.5": {5: 2.0},
        "eval/d/loss_by_logsnr/13.5": {5: 0.0},
    }
    train, held_out = curves.levels(found)
    assert train["series"] == [{"name": "step 5", "points": [[-10, 1], [10, 3]]}]
    assert train["log"]
    assert held_out["series"][0]["points"] == [[-13.5, 2.0], [13.5, 0.0]]
    assert not held_out["log"], "zero has no logarithm"


def test_evenly_keeps_both_ends():
    assert curves.evenly(list(range(100)), 4) == [0, 33, 66, 99]
    assert curves.evenly([1, 2], 4) == [1, 2]
