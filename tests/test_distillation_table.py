"""benchmarks/distillation.py: the table of all methods, in toy size."""

import dataclasses
import importlib
import json
import shutil
import sys
import types

import numpy as np
import pytest
from scipy import special

from diffusionlab import main, registry
from diffusionlab.data.generated import Mixture
from diffusionlab.evals import mixture


@pytest.fixture(scope="module")
def table(root):
    """The two modules: (distillation, distillation_measures)."""
    sys.path.insert(0, str(root / "benchmarks"))
    names = "distillation", "distillation_measures"
    yield tuple(importlib.import_module(name) for name in names)
    sys.path.remove(str(root / "benchmarks"))


def test_every_method_has_a_row(table):
    distillation, _ = table
    methods = set(registry.table("objective")) & {
        name
        for name, place in registry.table("objective").items()
        if place.startswith("diffusionlab.distillation.")
    }
    assert set(distillation.METHODS) == methods
    for method in distillation.METHODS.values():
        assert method.steps is None or method.why, "a dash has a reason"


def test_distance_to_the_density_is_the_limit_of_that_to_draws(table):
    _, measures = table
    source = Mixture(split="test")
    label = np.arange(8000) % 8
    weights = np.full(8, 1 / 8)
    exact = [measures.fresh(source, label, seed) for seed in range(8)]
    floor = np.mean([measures.to_density(x, weights, source) for x in exact])
    pairs = [mixture.sliced_wasserstein(*exact[i : i + 2], 64) for i in range(0, 8, 2)]
    # Of n samples and n draws it is about sqrt(2) times that to the density; one number
    # varies by a quarter, so the mean of four by an eighth.
    assert floor == pytest.approx(np.mean(pairs) / np.sqrt(2), rel=0.25)
    # Far above the floor both are the same: W1 of a shift is its length, and the mean
    # over directions of |cos| is 2 / pi; 64 random directions leave 7 % of it.
    moved = exact[0] + np.array([0.3, 0.0])
    far = measures.to_density(moved, weights, source)
    near = mixture.sliced_wasserstein(moved, exact[1], measures.DIRECTIONS)
    assert far == pytest.approx(near, rel=0.01)
    assert far == pytest.approx(0.3 * 2 / np.pi, rel=0.2)
    assert measures.to_density(exact[0] + 50.0, weights, source) > 10


def test_quantiles_are_at_no_distance_from_their_density(table):
    _, measures = table
    quantiles = 0.1 * special.ndtri((np.arange(5000) + 0.5) / 5000)
    x = np.concatenate([quantiles - 1, quantiles + 1])[:, None]
    source = types.SimpleNamespace(means=np.array([[-1.0], [1.0]]), std=0.1)
    weights = np.array([0.5, 0.5])
    assert measures.to_density(x, weights, source) < 5e-5
    # A tenth of the samples has to go from one mean to the other.
    share = np.array([0.6, 0.4])
    assert measures.to_density(x, share, source) == pytest.approx(0.2, abs=1e-3)


def test_numbers_of_the_mixture_are_those_of_what_was_done_to_it(table):
    _, measures = table
    source = Mixture(split="test")
    label = np.arange(8000) % 8
    # 100 samples of label 0 land at component 4, and all have half the spread.
    eps = np.random.default_rng(0).normal(size=(8000, 2))
    shown = np.where((label == 0) & (np.arange(8000) < 800), 4, label)
    x = source.means[shown] + 0.5 * source.std * eps
    numbers = measures.of_mixture(x, label, source)
    assert numbers["weight_error"] == pytest.approx(0.1)
    assert numbers["accuracy"] == pytest.approx(1 - 100 / 8000)
    # The relative deviation of a variance of 16,000 numbers: 1.1 %.
    assert numbers["variance_ratio"] == pytest.approx(0.25, rel=0.04)
    gone = measures.of_mixture(source.means[np.where(label < 4, 0, 4)], label, source)
    assert gone["weight_error"] == 3 and gone["variance_ratio"] < 1e-20


def test_seconds_are_those_of_the_steps_also_over_a_restart(table):
    _, measures = table
    rows = [
        {"step": 10, "perf/examples_per_second": 20.0},
        {"step": 10, "eval/mixture/inside": 1.0},
        {"step": 15, "perf/examples_per_second": 40.0},
    ]
    assert measures.seconds_of(rows, batch=8) == pytest.approx(4 + 1)


def test_a_run_made_anew_is_measured_again(table, teacher_run, tmp_path, monkeypatch):
    distillation, _ = table
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    measured = []

    def measure(*given):
        measured.append(given)
        return {"distance": 1.0}, {}

    def add():
        made = distillation.Table("mixture", 100, tmp_path)
        monkeypatch.setattr(made, "_measured", measure)
        made.add("teacher, ddim", 1, run, {"name": "ddim", "num_steps": 1})

    for expected in (1, 1):
        add()
        assert len(measured) == expected
    parameters = max(
        (path for path in (run / "checkpoints" / "10").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    parameters.write_bytes(parameters.read_bytes()[:-1])
    add()
    assert len(measured) == 2


def test_what_differs_in_a_row_is_a_note(table):
    distillation, measures = table
    note = distillation.METHODS["moment_matching_instant"].notes["mixture"]
    rows = [
        {"method": name, "steps": 1, "numbers": {"distance": 0.5}}
        for name in ("moment_matching_instant", "boot")
    ]
    notes = {"moment_matching_instant": note}
    text = measures.markdown("mixture", rows, {}, {}, notes)
    assert "| moment_matching_instant \\* | 0.5 |" in text and "| boot | 0.5 |" in text
    assert text.endswith(f"\\*:\n\n- moment_matching_instant: {note}\n")


@pytest.mark.slow
def test_the_table_is_made_once_and_goes_on_where_it_stopped(
    table, teacher_run, tmp_path, capsys
):
    distillation, _ = table
    for name in ("solved", "mixture"):
        (tmp_path / name).symlink_to(teacher_run)
    bare = ["--config.evals={}", "--config.train.num_steps=4"]
    bare += ["--config.logging.samples_every=0", "--config.logging.tensorboard=False"]

    def make(*more, methods=("multistep_consistency", "boot", "guided")):
        options = dict(methods=methods, runs=tmp_path, num_samples=800)
        options["overrides"] = [*bare, *more]
        status = distillation.run("mixture", steps=[1], **options)
        return status, capsys.readouterr().out

    status, said = make()
    assert status == 0, said
    out = tmp_path / "distillation_mixture"
    text = (out / "table.md").read_text()
    assert "| sliced-Wasserstein distance to the data | 1 | 256 |" in text
    (boot, *_) = [line for line in text.splitlines() if line.startswith("| boot")]
    assert boot.count("–") == 1, "it has one step"
    assert "| guided | – | – |" in text and "\n- guided: makes one" in text
    record = json.loads((out / "table.json").read_text())
    found = {(row["method"], row["steps"]): row["numbers"] for row in record["rows"]}
    for name in ("teacher, ddim", "teacher, ancestral", "teacher, ancestral 0.3"):
        assert {s for m, s in found if m == name} == {1, 256}
    gammas = {
        row["method"]: row["asked"]["sampler"].get("noise_exponent")
        for row in record["rows"]
    }
    assert gammas["teacher, ancestral"] == 0.0
    assert gammas["teacher, ancestral 0.3"] == 0.3
    assert found["multistep_consistency", 1]["seconds"] > 0
    assert record["real"]["distance"] < 0.05
    assert (out / "table.png").stat().st_size > 10_000
    assert "first step done" in (out / "multistep_consistency_1.log").read_text()

    (out / "multistep_consistency_1" / "result.json").unlink()
    status, said = make()
    assert status == 0 and said.count("training:") == 1
    assert (out / "table.md").read_text() == text

    other = "--config.objective.num_steps=3"
    status, said = make(other, methods=("multistep_consistency",))
    assert status == 1 and "failed" in said and "another config" in said
    with pytest.raises(ValueError, match="did you mean 'boot'"):
        make(methods=("boots",))
    with pytest.raises(ValueError, match="is for tokens, and mixture is numbers"):
        make(methods=("discrete_moment_matching",))


def test_the_teacher_at_equal_entropy_lies_on_its_curve(table):
    _, measures = table
    curve = {2.0: (8.0, 0.2), 3.0: (32.0, 0.6)}
    rows = [
        {
            "method": f"teacher, {entropy}",
            "steps": 4,
            "numbers": dict(entropy=entropy, perplexity=p, gradient_moment=moment),
        }
        for entropy, (p, moment) in curve.items()
    ]
    rows += [
        {"method": name, "steps": steps, "numbers": {"entropy": entropy}}
        for name, steps, entropy in (("a", 4, 2.5), ("b", 4, 3.1), ("c", 8, 2.5))
    ]
    # b is beyond the curve, and there is none for 8 steps.
    assert list(measures.at_equal_entropy(rows)) == [("a", 4)]
    found = measures.at_equal_entropy(rows)["a", 4]
    assert found["teacher_perplexity"] == pytest.approx(16.0)
    assert found["teacher_gradient_moment"] == pytest.approx(0.4)
    for row in rows[2:]:
        row["numbers"] |= dict(perplexity=20.0, gradient_moment=0.5)
    text = measures.markdown("text", measures.with_teacher("text", rows), {}, {}, {})
    assert "| that of the teacher at the same entropy | 4 | 8 |" in text
    assert "| a | 16 | – |" in text and "| b | – | – |" in text
    assert "a dash is an entropy that none of them reaches" in text


@pytest.mark.slow
def test_the_table_of_text(table, root, tmp_path, capsys, monkeypatch):
    distillation, measures = table
    cold = "teacher, temperature 0.7"
    text = measures.DATA["text"]
    text = dataclasses.replace(text, colder={cold: text.colder[cold]})
    monkeypatch.setitem(measures.DATA, "text", text)
    bare = ["--config.logging.samples_every=0", "--config.logging.tensorboard=False"]
    bare += ["--config.train.num_steps=4"]
    for run, config in text.runs.items():
        words = [f"--config={root}/configs/{config}.py:smoke", *bare]
        assert main.run([*words, f"--workdir={tmp_path / run}"]) == 0
    status = distillation.run(
        "text",
        methods=("discrete_moment_matching",),
        steps=[2],
        runs=tmp_path,
        num_samples=24,
        overrides=[*bare, "--config.data.batch_size=8", "--config.evals={}"],
    )
    assert status == 0, capsys.readouterr().out
    record = json.loads((tmp_path / "distillation_text" / "table.json").read_text())
    found = {(row["method"], row["steps"]): row["numbers"] for row in record["rows"]}
    assert {s for m, s in found if m == "teacher"} == {2, 256}
    assert {s for m, s in found if m == cold} == {2}
    numbers = found["discrete_moment_matching", 2]
    wanted = {"perplexity", "gradient_moment", "entropy", "seconds"}
    assert wanted <= set(numbers)
    assert record["real"]["perplexity"] > 1
    asked = [row["asked"] for row in record["rows"]]
    assert {a["sampler"]["temperature"] for a in asked} == {1.0, 0.7}
    assert len({a["reference"] for a in asked}) == 1
    written = (tmp_path / "distillation_text" / "table.md").read_text()
    assert "| perplexity under the language model | 2 | 256 |" in written
