import json
import math
import os
import subprocess
import sys

import pandas
import pytest

from launch import table

RATE, WIDTH = "config.optim.denoiser.learning_rate.value", "config.networks.width"
LOSS = "eval/held_out/loss"


def make_sweep(folder, points, **changes):
    """A sweep directory of trials that have not started; returns their folders."""
    about = {"name": "s", "config": "configs/x.py", "overrides": {}, "sweeps": ["a"]}
    about |= {"search": "", "seeds": 1, "metric": LOSS, "goal": "min"}
    about |= {"engine": "local", "resources": {}, "max_failures": 2, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(about))
    trials = []
    for number, point in enumerate(points):
        trials.append(folder / "runs" / f"{number:04d}-abc")
        trials[-1].mkdir(parents=True)
        asked = {"number": number, "config": "configs/x.py"}
        asked |= {"overrides": {"config.train.num_steps": 100}, "point": point}
        (trials[-1] / "trial.json").write_text(json.dumps(asked))
    return trials


def rows(trial, *several):
    text = "".join(json.dumps(row) + "\n" for row in several)
    (trial / "metrics.jsonl").write_text(text)


def finish(trial, step=100, **numbers):
    numbers = {f"eval/held_out/{name}": value for name, value in numbers.items()}
    (trial / "config.json").write_text(json.dumps({"train": {"num_steps": 100}}))
    result = {"step": step, "numbers": numbers}
    (trial / "result.json").write_text(json.dumps(result))


def happen(trial, *events):
    lines = [
        json.dumps({"event": kind, "time": time, **more}) for kind, time, more in events
    ]
    (trial / "attempts.jsonl").write_text("\n".join(lines) + "\n")


def test_a_table_says_what_each_trial_reached_and_cost(tmp_path):
    points = [{RATE: 0.1, WIDTH: 8}, {RATE: 0.2, WIDTH: 8}, {RATE: 0.3, WIDTH: 16}]
    a, b, c = make_sweep(tmp_path, points)
    rows(a, {"step": 50, LOSS: 3.0}, {"step": 100, LOSS: 2.0})
    finish(a, loss=2.0)
    job, again = {"job": "1"}, {"job": "2"}
    happen(
        a,
        ("submitted", 90.0, job),
        ("started", 100.0, job),
        ("ended", 130.0, {**job, "cause": "preempted"}),
        ("started", 200.0, again),
        ("ended", 204.5, {**again, "cause": "done"}),
    )
    rows(b, {"step": 10, LOSS: 5.0}, {"step": 20, LOSS: "nan"})
    happen(
        b,
        ("started", 10.0, job),
        ("ended", 12.0, {**job, "cause": "failed", "message": "first"}),
        ("started", 20.0, again),
        ("ended", 23.0, {**again, "cause": "out of memory"}),
    )
    found = table.frame(tmp_path)
    names = ["trial", "state", "best", "learning_rate.value", "width", LOSS]
    names += ["step", "seconds", "attempts", "preemptions", "failures", "message"]
    assert list(found.columns) == names
    rest = [None if pandas.isna(v) else v for v in found.iloc[2]]
    assert list(found.iloc[0])[:6] == ["0000-abc", "done", "*", 0.1, 8, 2.0]
    assert list(found.iloc[0])[6:] == [100, 34.5, 2, 1, 0, ""]
    assert list(found.iloc[1])[:6] == ["0001-abc", "given up", "", 0.2, 8, 5.0]
    assert list(found.iloc[1])[6:] == [20, 5.0, 2, 0, 2, "out of memory"]
    assert rest == ["0002-abc", "waiting", "", 0.3, 16, None, 0, 0.0, 0, 0, 0, ""]


def test_a_running_trial_counts_until_now_and_a_lost_one_to_its_last_row(tmp_path):
    a, b, c = make_sweep(tmp_path, [{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.3}])
    for trial, job in ((a, "1"), (b, "2"), (c, "3")):
        happen(trial, ("started", 1000.0, {"job": job}))
    rows(b, {"step": 10, LOSS: 5.0})
    os.utime(b / "metrics.jsonl", (1007.0, 1007.0))
    before = table.time.time()
    found = table.frame(tmp_path, alive={"1": "running"})
    assert list(found.state) == ["running", "gone", "gone"]
    assert before - 1000.1 <= found.seconds[0] <= table.time.time() - 999.9
    assert list(found.seconds[1:]) == [7.0, 0.0]


def test_the_result_decides_and_a_row_of_it_may_be_missing(tmp_path):
    a, b, c = make_sweep(tmp_path, [{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.3}])
    rows(a, {"step": 50, LOSS: 3.0})
    finish(a, loss=1.5)
    rows(b, {"step": 50, LOSS: 0.1})
    finish(b, loss="nan")
    rows(c, {"step": 50, LOSS: 0.2})
    finish(c, other=1.0)
    found = table.frame(tmp_path)
    assert list(found[LOSS].fillna(-1)) == [1.5, -1, 0.2]
    assert list(found.best) == ["", "", "*"]
    assert list(found.step) == [100, 100, 100]


def test_a_torn_last_line_is_left_out(tmp_path):
    (a,) = make_sweep(tmp_path, [{}])
    (a / "metrics.jsonl").write_text(f'{{"step": 1, "{LOSS}": 4.0}}\n{{"step": 2, "ev')
    assert list(table.frame(tmp_path)[LOSS]) == [4.0]
    (a / "metrics.jsonl").write_text('{"ste\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: damaged"):
        table.frame(tmp_path)


def test_of_very_many_rows_some_are_kept_and_the_last_value(tmp_path):
    (a,) = make_sweep(tmp_path, [{}])
    values = [*range(4000), 7.5, *["nan"] * 3]
    rows(a, *({"step": step, LOSS: value} for step, value in enumerate(values, 1)))
    (record,) = table.read(tmp_path)
    kept = record.measured[LOSS]
    assert list(kept)[0] == 1 and list(kept)[-1] == 4004 and 4001 in kept
    assert 800 <= len(kept) <= 801
    assert (record.step, record.value(LOSS)) == (4004, 7.5)


def test_short_names_are_clear_and_never_those_of_a_column():
    names = table.short_names(
        [
            "config.optim.denoiser.learning_rate.value",
            "config.optim.discriminator.learning_rate.value",
            "config.seed",
            "config.data.seed",
            "config.sampler.name",
            "config.train.step",
            "config.step",
        ],
        ("step",),
    )
    assert list(names.values()) == [
        "denoiser.learning_rate.value",
        "discriminator.learning_rate.value",
        "seed",
        "data.seed",
        "sampler.name",
        "train.step",
        "config.step",
    ]


def test_only_the_seed_of_the_run_is_called_seed():
    assert table.short_names(["config.data.seed"]) == {"config.data.seed": "data.seed"}
    assert table.short_names(["config.seed"]) == {"config.seed": "seed"}


def test_every_kind_of_value_has_a_cell(tmp_path):
    values = [3, 0.5, True, "a|b", [1, 2], {"name": "heun"}, None]
    make_sweep(tmp_path, [{"config.a.x": v, "config.b": 7} for v in values] + [{}])
    found = table.frame(tmp_path)
    cells = [3, 0.5, True, "a|b", "[1, 2]", '{"name": "heun"}', "None", None]
    assert list(found.x) == cells
    assert list(found.b) == [7] * 7 + [None], "a trial without it differs"
    assert "num_steps" not in found.columns, "all have the same"


def test_numbers_that_mean_the_same_do_not_vary(tmp_path):
    make_sweep(tmp_path, [{"config.a": 1}, {"config.a": 1.0}])
    assert "a" not in table.frame(tmp_path).columns
    make_sweep(tmp_path / "other", [{"config.a": 1}, {"config.a": True}])
    assert list(table.frame(tmp_path / "other").a) == [1, True]


def seeded(tmp_path, goal="min"):
    """Two rates with three seeds, one of 0.3, and one that still runs."""
    points = [{"config.seed": s, RATE: r} for r in (0.1, 0.2) for s in range(3)]
    points += [{"config.seed": 0, RATE: r} for r in (0.3, 0.4)]
    trials = make_sweep(tmp_path, points, goal=goal)
    values = (1.0, 2.0, 6.0, 2.0, 2.5, None, 5.0)
    for trial, value in zip(trials, values, strict=False):
        if value is not None:
            finish(trial, loss=value)
    happen(trials[5], *[("ended", 1.0, {"job": j, "cause": "failed"}) for j in "12"])
    rows(trials[7], {"step": 10, LOSS: 0.001})
    return table.frame(tmp_path)


def test_seeds_become_one_row_with_mean_and_deviation(tmp_path):
    found = seeded(tmp_path)
    assert list(found.columns)[3:5] == ["learning_rate.value", "seed"]
    merged = table.grouped(found, LOSS)
    names = ["best", "learning_rate.value", LOSS, "deviation", "runs", "missing"]
    assert list(merged.columns) == names
    assert list(merged.best) == ["*", "", "", ""]
    assert list(merged["learning_rate.value"]) == [0.2, 0.1, 0.3, 0.4]
    # (2 + 2.5) / 2; (1 + 2 + 6) / 3. What has not finished is no value.
    assert list(merged[LOSS].fillna(-1)) == [2.25, 3.0, 5.0, -1]
    # sqrt(2 * 0.25 ** 2); sqrt((4 + 1 + 9) / 2)
    assert list(merged.deviation.fillna(-1)) == pytest.approx(
        [math.sqrt(0.125), math.sqrt(7), -1, -1]
    )
    assert list(merged.runs) == [2, 3, 1, 0]
    assert list(merged.missing) == [1, 0, 0, 1]


def test_the_goal_turns_the_order_but_the_unfinished_stay_last(tmp_path):
    merged = table.grouped(seeded(tmp_path), LOSS, goal="max")
    assert list(merged["learning_rate.value"]) == [0.3, 0.1, 0.2, 0.4]
    assert list(merged.best) == ["*", "", "", ""]
    with pytest.raises(ValueError, match="--goal: must be min or max, got 'least'"):
        table.grouped(seeded(tmp_path / "again"), LOSS, goal="least")


def test_seeds_alone_are_one_row(tmp_path):
    trials = make_sweep(tmp_path, [{"config.seed": s} for s in (0, 1)])
    for trial, value in zip(trials, (1.0, 3.0), strict=True):
        finish(trial, loss=value)
    (row,) = table.grouped(table.frame(tmp_path), LOSS).to_dict("records")
    deviation = row.pop("deviation")
    assert row == {"best": "*", LOSS: 2.0, "runs": 2, "missing": 0}
    assert deviation == pytest.approx(math.sqrt(2))


def test_best_is_the_best_that_is_finished(tmp_path):
    trials = make_sweep(tmp_path, [{RATE: r} for r in (0.1, 0.2, 0.3)])
    with pytest.raises(ValueError, match=f"no trial is finished with a '{LOSS}' yet"):
        table.best(tmp_path)
    rows(trials[0], {"step": 50, LOSS: 0.01})
    finish(trials[1], loss=2.0, recall=0.1)
    finish(trials[2], loss=1.0, recall=0.0)
    assert table.best(tmp_path) == trials[2]
    assert table.best(tmp_path, "eval/held_out/recall", "max") == trials[1]
    finish(trials[2], step=99, loss=1.0)
    assert table.best(tmp_path) == trials[1], "it was asked to go on"


def test_an_unknown_metric_names_those_that_are_near(tmp_path):
    (a, b) = make_sweep(tmp_path, [{RATE: 0.1}, {RATE: 0.2}])
    assert list(table.frame(tmp_path, metric="x").x.isna()) == [True, True]
    rows(a, {"step": 50, "train/loss": 3.0, "train/by_level": [1.0]})
    assert table.frame(tmp_path)[LOSS].isna().all(), "evaluated at the end, perhaps"
    with pytest.raises(ValueError, match=r"the nearest .* have: train/loss\.$"):
        table.frame(tmp_path, metric="train/los")
    finish(a, error=1.0)
    with pytest.raises(ValueError, match=f"no trial .* has measured '{LOSS}'"):
        table.frame(tmp_path)
    with pytest.raises(ValueError, match=r"have: eval/held_out/error\.$"):
        table.best(tmp_path, "error")


def test_without_a_metric_there_is_no_column_and_no_best(tmp_path):
    (a,) = make_sweep(tmp_path, [{}], metric="")
    finish(a, loss=1.0)
    found = table.frame(tmp_path)
    assert "" not in found.columns and list(found.best) == [""]
    with pytest.raises(ValueError, match="--metric: .* give one"):
        table.best(tmp_path)


def test_tables_are_written_whole_as_csv_and_markdown(tmp_path):
    found = seeded(tmp_path / "sweep")
    path = tmp_path / "new" / "table.csv"
    table.write(found, path)
    again = pandas.read_csv(path, keep_default_na=False, na_values={LOSS: ""})
    assert list(again.columns) == list(found.columns)
    assert list(again[LOSS].fillna(-1)) == list(found[LOSS].fillna(-1))
    with pytest.raises(ValueError, match=r"table\.txt' must end in \.csv or \.md"):
        table.write(found, tmp_path / "table.txt")
    values = {"a|b": ["x\ny", "|", None], "n": [1, 2, 3], "v": [1 / 3, None, 2e-7]}
    table.write(pandas.DataFrame(values), tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == (
        "| a\\|b | n | v |\n| --- | ---: | ---: |\n| x y | 1 | 0.333333 |\n"
        "| \\| | 2 |  |\n|  | 3 | 2e-07 |\n"
    )
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]


def test_a_sweep_without_trials_is_an_empty_table(tmp_path):
    make_sweep(tmp_path, [])
    found = table.frame(tmp_path)
    assert len(found) == 0 and LOSS in found.columns
    assert len(table.grouped(found, LOSS)) == 0
    assert table.markdown(found).count("\n") == 2
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        table.frame(tmp_path / "nothing")


def test_the_table_needs_neither_jax_nor_the_engines(root):
    code = (
        "import sys, launch.table; "
        "print(sorted({'jax', 'optuna', 'submitit'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
