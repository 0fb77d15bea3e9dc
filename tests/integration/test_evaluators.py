"""The evaluators that use samplers and densities, on one run, by the command line."""

import json
import shutil

import pytest

from diffusionlab import main

EVALS = {
    "bits": {
        "name": "likelihood",
        "num_examples": 16,
        "num_times": 2,
        "num_steps": 1,
    },
    "codes": {"name": "inversion", "num_steps": (2,), "num_examples": 16},
    "holes": {"name": "inpainting", "num_examples": 8, "num_draws": 2},
    "edits": {"name": "image_to_image", "start_times": (0.5,), "num_examples": 16},
    "samplers": {
        "name": "sampler_comparison",
        "samplers": ({"name": "ddim", "num_steps": 1},),
        "num_evaluations": (2,),
        "num_samples": 20,
    },
}


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluators") / "run"
    words = [f"--config={root}/configs/mixture/analytic.py:smoke"]
    overrides = ["train.num_steps=0", "evals={}", "logging.tensorboard=False"]
    words += [f"--config.{o}" for o in overrides]
    assert main.run([*words, f"--workdir={folder}"]) == 0
    return folder


def test_evaluators_given_on_the_command_line_run_on_a_run_without_them(run, capsys):
    words = [f"--workdir={run}", "--mode=eval", f"--config.evals={EVALS}"]
    assert main.run(words) == 0
    numbers = {}
    for label in EVALS:
        record = json.loads((run / "evals" / f"step_00000000_{label}.json").read_text())
        numbers[label] = record["numbers"]
        for name in record["pictures"]:
            assert (run / name).stat().st_size > 1000
    assert set(numbers["bits"]) >= {"bound_bits", "flow_bits", "flow_error"}
    assert set(numbers["codes"]) == {
        "round_trip/2",
        "code_mean/2",
        "code_variance/2",
    }
    assert "hidden_error" in numbers["holes"]
    assert set(numbers["edits"]) == {"distance/0.5", "distance_other"}
    assert {"ddim/2/frechet", "real/frechet"} <= set(numbers["samplers"])
    assert "sampler_comparison: 1 of 1, ddim" in capsys.readouterr().out


def records(run):
    return {
        path.name: json.loads(path.read_text())
        for path in (run / "evals").glob("*_codes*.json")
    }


def test_results_of_other_settings_lie_beside_each_other(run):
    """An evaluator of the run's own, and one that only the command line names."""
    folder = run.parent / "copy"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evals"))
    stored = json.loads((folder / "config.json").read_text())
    plain = "step_00000000_codes.json"
    block = {"name": "inversion", "num_steps": [2], "num_examples": 8}

    def evaluated(**changes):
        before = records(folder)
        evals = {"codes": {**block, **changes}}
        words = [f"--workdir={folder}", "--mode=eval", f"--config.evals={evals}"]
        assert main.run(words) == 0
        after = records(folder)
        for name, old in before.items():
            assert after[name]["numbers"] == old["numbers"]
        return sorted(set(after) - set(before)), after

    assert evaluated()[0] == [plain]
    assert evaluated(every=7)[0] == [], "when it runs is no setting"
    (other,), found = evaluated(num_steps=[3])
    assert other.startswith("step_00000000_settings-")
    assert evaluated(num_steps=[3])[0] == []
    assert found[other]["settings"]["num_steps"] == [3]
    assert found[plain]["settings"]["num_steps"] == [2]
    assert found[other]["evaluator"] == other[14:-5]
    # The run's own settings have the plain name, also where its config is from before
    # an option was there.
    shutil.rmtree(folder / "evals")
    stored["evals"] = {"codes": {**block, "num_steps": [3]}}
    del stored["sampler"]["grid"]
    (folder / "config.json").write_text(json.dumps(stored))
    (other,), _ = evaluated()
    assert other.startswith("step_00000000_settings-")
    assert evaluated(num_steps=[3])[0] == [plain]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"name": "inpainting", "mask": "left"}, "evals.x.mask: 'left' does not suit"),
        ({"name": "likelihood", "levels": 17}, "evals.x.levels: the data are not 17"),
        ({"name": "image_to_image", "label": 8}, "evals.x.label: expected one of 8"),
        (
            {"name": "inversion", "sampler": {"name": "ancestral", "num_steps": 2}},
            "evals.x.sampler: Ancestral draws fresh noise",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_it_starts(run, block, said):
    evals = {"x": block}
    with pytest.raises(ValueError, match=said):
        main.run([f"--workdir={run}", "--mode=eval", f"--config.evals={evals}"])
