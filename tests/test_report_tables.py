"""Intervals, tables by class, samplers compared, and where numbers come from."""

import re

import pytest

from diffusionlab import curves
from diffusionlab import report_tables as tables

NASTY = "</script><b>"


def cells(page):
    """The rows of each table of a page, as text; '|' stands for markup in a cell."""
    return [
        [
            [re.sub("(<[^>]+>)+", "|", cell).strip("|") for cell in _CELL.findall(row)]
            for row in re.findall("<tr>(.*?)</tr>", table)
        ]
        for table in re.findall("<table>(.*?)</table>", page)
    ]


_CELL = re.compile("<t[hd][^>]*>(.*?)</t[hd]>")


def test_numbers_stand_beside_their_intervals_and_real_data():
    result = {
        "numbers": {"frechet": 12.3456, "frechet_real": 2.0, "recall": 0.5},
        "intervals": {"frechet": [11.0, 13.75], "frechet_real": [1.5, 2.5]},
    }
    (table,) = cells(tables.of_result(result))
    assert table[0] == ["number", "value", "95 % interval", "real data"]
    assert table[1] == ["frechet", "12.35", "11 to 13.75", "2|1.5 to 2.5"]
    assert table[2] == ["recall", "0.5", "", ""]
    (bare,) = cells(tables.of_result({"numbers": {"recall": 0.5}}))
    assert bare == [["number", "value"], ["recall", "0.5"]]


@pytest.mark.parametrize(
    ("numbers", "class_names", "table"),
    [
        # One metric: only the names of the classes tell them from other parts.
        ({"a/cat": 1, "a/dog": 2}, ("dog", "cat"), {"cat": {"a": 1}, "dog": {"a": 2}}),
        ({"a/cat": 1, "a/dog": 2}, (), {}),
        ({"a/x": 1, "b/x": 2, "b/y": 3}, (), {"x": {"a": 1, "b": 2}}),
        ({"a/x/y": 1, "b/x/y": 2}, (), {}),
        ({"a/x/y": 1}, ("x/y",), {"x/y": {"a": 1}}),
        ({"loss_by_logsnr/-1.5": 1, "eps_by_logsnr/-1.5": 2}, (), {}),
    ],
)
def test_parts_are_a_table_where_they_are_classes_or_shared(
    numbers, class_names, table
):
    found, rest = curves.by_part({"whole": 0, **numbers}, class_names)
    assert found == table
    placed = {f"{metric}/{part}" for part, row in table.items() for metric in row}
    assert list(rest) == ["whole", *(n for n in numbers if n not in placed)]


def test_classes_are_rows_metrics_columns_and_the_worst_is_marked():
    numbers = {"class_frechet": 5.0}
    for name, distance, share in (
        ("dog", 4.0, 0.9),
        ("<cat>", 6.0, 0.8),
        ("x", 5.0, 1),
    ):
        numbers |= {f"class_frechet/{name}": distance, f"accuracy/{name}": share}
    numbers["accuracy/only"], numbers["odd/0.5"] = 0.7, 1.0
    result = {
        "numbers": numbers,
        "intervals": {"class_frechet/dog": [3, 5]},
        "class_names": ["dog", "<cat>", "x", "only"],
    }
    page = tables.of_result(result)
    whole, classes, rest = cells(page)
    assert whole[1:] == [["class_frechet", "5"]]
    assert classes[:3] == [
        ["class", "class_frechet", "accuracy"],
        ["dog", "4|3 to 5", "0.9"],
        ["&lt;cat&gt;", "6", "0.8"],
    ]
    assert classes[4] == ["only", "", "0.7"]
    assert rest[1:] == [["odd/0.5", "1"]]
    assert re.findall("<td class='worst'>(.*?)</td>", page) == ["6", "0.7"]


def test_worst_knows_which_way_a_metric_points():
    values = {"a": 1.0, "b": 2.0, "c": float("nan"), "d": 2.0}
    assert curves.worst("class_frechet", values) == {"b", "d"}
    assert curves.worst("inception_score", values) == {"a"}
    assert curves.worst("code_mean", values) == set(), "nobody knows"
    assert curves.worst("error", {"a": 1.0, "b": 1.0}) == set(), "all alike"


def test_samplers_are_rows_and_their_evaluations_columns():
    numbers = {"real/d": 1.0, "real/share": 0.9}
    for count in ("16", "4", "16 (0.1)"):
        numbers[f"ddim, grid=a/b/{count}/d"] = float(count[:2])
    numbers["heun/16/d"] = 3.0
    result = {
        "numbers": numbers,
        "settings": {"name": "sampler_comparison"},
        "intervals": {"heun/16/d": [2, 4]},
        "notes": {"refused": NASTY},
    }
    page = tables.of_result(result)
    first, second = cells(page)
    assert first == [
        ["", "4", "16", "16 (0.1)"],
        ["real data", "1"],
        ["ddim, grid=a/b", "4", "16", "16"],
        ["heun", "", "3|2 to 4", ""],
    ]
    assert second == [[""], ["real data", "0.9"]]
    assert page.count("<details open>") == 1, "the first of two"
    assert NASTY not in page


def test_provenance_is_a_sentence_with_all_of_it_folded_in():
    about = {
        "samples": {"num": 10_000, "step": 50, "ema": "main", "sampler": {"name": "x"}},
        "reference": {"name": "train data of D", "num": 1437, "sha256": "ab" * 32},
        "network": {"network": NASTY, "weights": "6726825d" * 8, "long": "x" * 99},
        "diffusionlab": "0.1.0",
    }
    page = tables.provenance(about)
    sentence = re.search("<summary>(.*)</summary>", page)[1]
    assert sentence == (
        "10,000 samples (step 50, ema main); against 1,437 examples of train data of D "
        "(sha256 abababab); features of &lt;/script&gt;&lt;b&gt; (weights 6726825d); "
        "diffusionlab 0.1.0"
    )
    assert "x" * 99 in page and NASTY not in page
    assert tables.provenance({}) == ""
    assert "where the numbers come from" in tables.provenance({"other": [1]})
