"""Sample quality on whole runs: files, resumption, classifiers of this program."""

import json

import numpy as np
import pytest

from diffusionlab import checks, inference, main, workdir
from diffusionlab.evals import feature_store

BARE = (
    "train.num_steps=0",
    "evals={}",
    "logging.tensorboard=False",
    "checkpoint.best=",
)


def trained(root, folder, config, *overrides):
    words = [f"--config={root}/configs/{config}.py:smoke", f"--workdir={folder}"]
    words += [f"--config.{o}" for o in (*BARE, *overrides)]
    assert main.run(words) == 0
    return folder


@pytest.fixture(scope="module")
def solved(root, tmp_path_factory):
    """A run whose denoiser is exact, of vectors."""
    folder = tmp_path_factory.mktemp("quality") / "solved"
    return trained(root, folder, "mixture/analytic")


def evaluated(run, label="q", **block):
    block = {"name": "sample_quality", "extractor": {"name": "pixels"}, **block}
    words = [f"--workdir={run}", "--mode=eval", f"--config.evals={ {label: block} }"]
    assert main.run(words) == 0
    (path,) = (run / "evals").glob(f"step_*_{label}.json")
    return json.loads(path.read_text())


FRECHET = {"name": "frechet", "groups": 5}


def test_an_exact_denoiser_scores_as_real_data_do(solved, capsys):
    found = evaluated(
        solved,
        "exact",
        num_samples=400,
        reference="test",
        baseline="train",
        metrics=[FRECHET, {"name": "sliced_wasserstein"}, {"name": "kernel"}],
    )
    numbers, (low, high) = found["numbers"], found["intervals"]["frechet"]
    assert low < numbers["frechet"] < high
    # Both are noise of about one size; a sampler of few steps adds its own.
    assert numbers["frechet"] < 10 * numbers["frechet_real"] + 0.05
    assert found["provenance"]["samples"]["num"] == 400
    assert found["provenance"]["samples"]["step"] == 0
    assert found["provenance"]["network"] == {"network": "pixels"}
    assert "jax" in found["versions"]
    printed = capsys.readouterr().out
    assert "exact:\n  warning: kernel: subsets of 400" in printed
    assert "real data: " in printed and "eval/exact/frechet  " in printed
    assert not list((solved / "evals").glob(".unfinished*"))


def test_an_interrupted_evaluation_goes_on(solved, monkeypatch, capsys):
    block = dict(num_samples=60, metrics=[FRECHET], reference="test")
    whole = evaluated(solved, "whole", **block)
    stream, drawn = inference.stream, []

    def interrupted(*args, **kwargs):
        for number, batch in enumerate(stream(*args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    def counted(*args, **kwargs):
        for x, label in stream(*args, **kwargs):
            drawn.append(len(x))
            yield x, label

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inference, "stream", interrupted)
        evaluated(solved, "part", **block)
    (left,) = (solved / "evals").glob(".unfinished*")
    assert feature_store.Stored(left / "samples", "samples").num == 48
    monkeypatch.setattr(inference, "stream", counted)
    with monkeypatch.context() as patch:
        # Of other weights nothing is gone on with.
        patch.setattr(inference, "digest", lambda _: "other")
        evaluated(solved, "part", **block)
    assert drawn == [24, 24, 12]
    drawn.clear()
    found = evaluated(solved, "part", **block)
    # The rest, in batches of 20 rounded up to the eight devices.
    assert drawn == [12]
    assert found["numbers"] == whole["numbers"]
    assert found["provenance"] == whole["provenance"]


def test_sobol_noise_needs_a_deterministic_sampler(solved, monkeypatch):
    sobol = evaluated(solved, "sobol", num_samples=64, metrics=[FRECHET], sobol=True)
    plain = evaluated(solved, "plain", num_samples=64, metrics=[FRECHET])
    digests = [q["provenance"]["samples"]["sha256"] for q in (sobol, plain)]
    assert digests[0] != digests[1]
    assert sobol["provenance"]["samples"]["sobol"] is True
    block = {"name": "sample_quality", "extractor": {"name": "pixels"}, "sobol": True}
    words = [f"--workdir={solved}", "--mode=eval", f"--config.evals={ {'q': block} }"]
    noisy = "--config.sampler={'name':'ancestral','num_steps':2}"
    with pytest.raises(ValueError, match="config.evals.q.sobol: the sampler draws noi"):
        main.run([*words, noisy])
    monkeypatch.setattr(checks, "_MAX_SOBOL", 1)
    with pytest.raises(ValueError, match="q.sobol: .* at most 1 dimension"):
        main.run(words)


def test_a_classifier_of_this_program_gives_features(root, tmp_path):
    classifier = trained(root, tmp_path / "classifier", "digits/classifier")
    digits = trained(root, tmp_path / "digits", "digits/denoising")
    found = evaluated(
        digits,
        extractor={"name": "classifier", "run": str(classifier)},
        num_samples=20,
        num_reference=30,
        metrics=[{"name": "frechet", "groups": 0}, {"name": "inception_score"}],
    )
    about = found["provenance"]["network"]
    assert about["step"] == 0 and len(about["weights"]) == 64
    assert np.isfinite(found["numbers"]["frechet"])
    # Its last layer starts at zero: every class as likely as any other.
    assert found["numbers"]["inception_score"] == pytest.approx(1.0, abs=1e-6)
    for extractor, said in (
        ({"run": str(digits)}, "extractor.run: .* 'denoising', which is no classifier"),
        ({"run": str(tmp_path)}, "config.evals.q.extractor.run: .* holds no run"),
        ({"run": str(classifier), "step": 7}, "step: no checkpoint of step 7"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            evaluated(digits, extractor={"name": "classifier", **extractor})
    assert workdir.saved_steps(digits) == [0]


def test_evaluators_share_the_samples_that_they_have_in_common(solved, monkeypatch):
    make, drawn = inference.make_draw, []

    def counted(*args):
        draw = make(*args)

        def run(params, seed, indices, *rest):
            drawn.append(int(indices[0]))
            return draw(params, seed, indices, *rest)

        return run

    monkeypatch.setattr(inference, "make_draw", counted)
    block = {"name": "sample_quality", "extractor": {"name": "pixels"}}
    block |= {"metrics": [FRECHET], "reference": "test"}
    evals = {"less": {**block, "num_samples": 30}, "more": {**block, "num_samples": 70}}
    words = [f"--workdir={solved}", "--mode=eval", f"--config.evals={evals}"]
    assert main.run(words) == 0
    assert drawn == [0, 24, 48]
    found = {
        label: json.loads(next((solved / "evals").glob(f"*_{label}.json")).read_text())
        for label in evals
    }
    alone = evaluated(solved, "alone", num_samples=70, metrics=[FRECHET])
    assert found["more"]["provenance"]["samples"] == alone["provenance"]["samples"]
