"""The table on the terminal: intervals, and real data beside each figure."""

from diffusionlab import evaluate
from diffusionlab.types import EvalResult


def test_a_figure_stands_with_its_interval_and_that_of_real_data():
    numbers = {
        "eval/q/frechet": 1.25,
        "eval/q/class_frechet/3": 2.0,
        "eval/q/alone": 7.0,
        "eval/q/frechet_real": 0.5,
        "eval/q/class_frechet_real/3": 4.0,
    }
    lines = evaluate.table(numbers, {"eval/q/frechet": (1.0, 1.5)}).splitlines()
    assert [line.split() for line in lines] == [
        ["eval/q/frechet", "1.25", "[1,", "1.5]", "real", "data:", "0.5"],
        ["eval/q/class_frechet/3", "2", "real", "data:", "4"],
        ["eval/q/alone", "7"],
    ]
    assert len({line.index("real data") for line in lines[:2]}) == 1
    assert evaluate.table({}) == ""


def test_names_without_a_label_find_their_real_figure():
    line = evaluate.table({"frechet": 1.0, "frechet_real": 2.0})
    assert line.split() == ["frechet", "1", "real", "data:", "2"]


def test_warnings_are_told_and_other_notes_are_not():
    notes = {"warning: kernel": "few", "frechet": "of 10 samples"}
    assert evaluate.warnings_of(EvalResult({}, notes)) == "\n  warning: kernel: few"
    assert evaluate.warnings_of(EvalResult({}, {})) == ""
