import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from sklearn import datasets

from diffusionlab import evaluate_files
from diffusionlab.evals import statistics_file
from diffusionlab.metrics import moments
from diffusionlab.metrics.frechet import frechet_distance

FRECHET = [{"name": "frechet"}]
PIXELS = {"name": "sample_quality", "extractor": {"name": "pixels"}, "metrics": FRECHET}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSIONLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits():
    """All digits, `[1797, 8, 8, 1]` in [-1, 1], and their classes."""
    found = datasets.load_digits()
    return (found.images[..., None] / 8 - 1).astype(np.float32), found.target


@pytest.fixture
def samples(tmp_path, digits):
    """A file of 200 digits, the brightness of which is halved."""
    x, label = digits
    path = tmp_path / "mine.npz"
    np.savez(path, x=(x[:200] - 1) / 2, label=label[:200])
    return str(path)


def distance(a, b):
    rows = [z.reshape(len(z), -1) for z in (a, b)]
    return frechet_distance(*map(moments.of_rows, rows))


def quality(**options):
    return {"quality": {**PIXELS, **options}}


def test_digits_against_the_data_set_give_the_exact_distance(
    samples, digits, tmp_path, cache, capsys
):
    """The same numbers as of the arrays themselves, in one folder with a page."""
    out = evaluate_files.run(samples=samples, reference="digits", evals=quality())
    assert out == tmp_path / "mine_evaluation"
    from diffusionlab.data.sources import Digits

    train = Digits()
    real = train.__getitems__(np.arange(len(train)))["x"]
    exact = distance((digits[0][:200] - 1) / 2, real)
    found = json.loads((out / "evaluation.json").read_text())
    one = found["evals"]["quality"]
    assert one["numbers"]["frechet"] == pytest.approx(exact, rel=1e-6)
    low, high = one["intervals"]["frechet"]
    assert low < exact < high
    assert one["provenance"]["samples"]["num"] == 200
    assert found["samples"] == {
        "path": samples, "version": one["provenance"]["samples"]["version"],
        "num_in_file": 200,
    }  # fmt: skip
    assert found["reference"]["num"] == 1442 and "versions" in found["environment"]
    assert one["settings"]["num_samples"] == 200
    assert one["versions"] == found["environment"]["versions"]
    assert not {"step", "evaluator"} & set(one)
    page = (out / "report.html").read_text()
    assert "frechet" in page and "data:image/png" in page
    assert f"{exact:.4g}" in capsys.readouterr().out
    assert not list(out.glob(".unfinished*")) and any(cache.rglob("features.bin"))


def test_fewer_samples_than_asked_for_are_all_and_that_is_said(
    samples, tmp_path, capsys
):
    out = evaluate_files.run(
        samples=samples, reference=samples, evals=quality(num_samples=50_000)
    )
    said = "config.evals.quality.num_samples: 50000 asked for, all 200 there are taken"
    assert said in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())["evals"]["quality"]
    assert found["notes"]["settings"] == said
    assert found["numbers"]["frechet"] == pytest.approx(0.0, abs=1e-6)
    evaluate_files.run(
        samples=samples, reference=samples, evals=quality(num_samples=20)
    )
    found = json.loads((out / "evaluation.json").read_text())["evals"]["quality"]
    assert found["provenance"]["samples"]["num"] == 20
    said = found["notes"]["warning: frechet"]
    assert f"warning: frechet: {said}" in capsys.readouterr().out


def test_published_statistics_are_a_reference(samples, tmp_path, digits):
    rows = digits[0].reshape(1797, -1).astype(np.float64)
    path = str(tmp_path / "stats.npz")
    np.savez(path, mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    out = evaluate_files.run(
        samples=samples, reference=path, evals=quality(), out=tmp_path / "out"
    )
    found = json.loads((out / "evaluation.json").read_text())["evals"]["quality"]
    exact = distance((digits[0][:200] - 1) / 2, digits[0])
    assert found["numbers"]["frechet"] == pytest.approx(exact, rel=1e-6)
    assert found["settings"]["reference"] == path
    with pytest.raises(ValueError, match=r"stats\.npz' has statistics"):
        recall = [{"name": "precision_recall"}]
        evaluate_files.run(
            samples=samples, reference=path, evals=quality(metrics=recall)
        )
    with pytest.raises(ValueError, match="--reference: .* has statistics only"):
        evaluate_files.run(
            samples=samples, reference=path, evals=quality(reference="train")
        )


def test_statistics_of_another_network_are_refused(samples, tmp_path, digits):
    path = tmp_path / "stats.npz"

    class Set:
        num = 1797

        def moments(self, output):
            return moments.of_rows(digits[0].reshape(1797, -1))

    statistics_file.write(
        path, Set(), {"fingerprint": "0", "network": {"network": "x"}}
    )
    with pytest.raises(ValueError, match="network 'x' there, 'pixels' here"):
        evaluate_files.run(samples=samples, reference=str(path), evals=quality())


def test_out_belongs_to_one_pair_of_inputs(samples, tmp_path, digits):
    one = {"a": PIXELS}
    out = evaluate_files.run(samples=samples, reference=samples, evals=one)
    moved = tmp_path / "moved.npz"
    moved.write_bytes((tmp_path / "mine.npz").read_bytes())
    again = {"b": PIXELS}
    evaluate_files.run(samples=str(moved), reference=samples, evals=again, out=out)
    assert set(json.loads((out / "evaluation.json").read_text())["evals"]) == {"a", "b"}
    np.savez(moved, x=digits[0][:50])
    with pytest.raises(ValueError, match="^--out: .* results of other samples: "):
        evaluate_files.run(samples=str(moved), reference=samples, evals=one, out=out)
    one_changed = digits[0][:200].copy()
    one_changed[7, 0, 0, 0] = 1
    np.savez(moved, x=(one_changed - 1) / 2, label=digits[1][:200])
    with pytest.raises(ValueError, match="^--out: .* results of other samples: "):
        evaluate_files.run(samples=str(moved), reference=samples, evals=one, out=out)
    with pytest.raises(ValueError, match="^--out: .* results of other reference"):
        evaluate_files.run(samples=samples, reference=str(moved), evals=one, out=out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("mine")
    with pytest.raises(ValueError, match="^--out: .* not as results"):
        evaluate_files.run(
            samples=samples, reference=samples, evals=one, out=tmp_path / "thesis"
        )


@pytest.mark.parametrize("block", [
    {"name": "denoising_loss"},
    {"name": "likelihood"},
    {"name": "inpainting"},
    {"name": "inversion"},
    {"name": "image_to_image"},
    {"name": "sampler_comparison", "samplers": [{"name": "ddim", "num_steps": 2}]},
    {**PIXELS, "sobol": True},
], ids=lambda b: b["name"])  # fmt: skip
def test_what_needs_a_run_is_one_line(samples, tmp_path, block):
    with pytest.raises(evaluate_files.LeftOut) as raised:
        evaluate_files.run(samples=samples, reference="digits", evals={"a": block})
    said = str(raised.value)
    assert said.startswith("config.evals.a: needs a run: it asks for ")
    assert "\n" not in said and isinstance(raised.value, RuntimeError)
    out = tmp_path / "mine_evaluation"
    assert not [*out.glob("evals/*"), *out.glob(".unfinished*")]


def test_what_needs_a_run_is_left_out_beside_what_does_not(samples, capsys):
    evals = {"l": {"name": "likelihood"}, "d": {"name": "denoising_loss"}, "q": PIXELS}
    out = evaluate_files.run(samples=samples, reference=samples, evals=evals)
    found = json.loads((out / "evaluation.json").read_text())
    assert set(found["evals"]) == {"q"} and set(found["left_out"]) == {"l", "d"}
    said = capsys.readouterr().out
    assert "left out: config.evals.l: needs a run" in said
    assert "left out: config.evals.d: needs a run" in said


def test_no_evaluator_is_one_line(samples, tmp_path):
    with pytest.raises(ValueError, match="^evals: empty"):
        evaluate_files.run(samples=samples, reference=samples, evals={})
    assert not (tmp_path / "mine_evaluation").exists()


def test_out_that_cannot_be_written_is_one_line(samples):
    out = pathlib.Path(samples) / "x"
    with pytest.raises(ValueError) as raised:
        evaluate_files.run(
            samples=samples, reference=samples, evals={"q": PIXELS}, out=out
        )
    said = f"--out: cannot write '{out}': Not a directory; give another."
    assert str(raised.value) == said


def test_one_set_is_no_baseline_of_itself(samples, digits, tmp_path, capsys):
    """Of a file `train` and `test` are the same; a data set has both."""
    out = evaluate_files.run(
        samples=samples, reference=samples, evals=quality(baseline="test")
    )
    said = (
        "config.evals.quality.baseline: left out: --reference is one set, and a set "
        "compared with itself says nothing"
    )
    assert f"note: {said}\n" in capsys.readouterr().out
    one = json.loads((out / "evaluation.json").read_text())["evals"]["quality"]
    assert one["settings"]["baseline"] == "" and one["notes"]["settings"] == said
    assert set(one["numbers"]) == {"frechet"}
    out = evaluate_files.run(
        samples=samples, reference="digits", evals=quality(baseline="test"),
        out=tmp_path / "both",
    )  # fmt: skip
    one = json.loads((out / "evaluation.json").read_text())["evals"]["quality"]
    assert set(one["numbers"]) == {"frechet", "frechet_real"}
    assert "settings" not in one["notes"]


def test_what_compares_splits_is_left_out_where_there_is_one_set(samples, capsys):
    block = {"name": "samples"}
    said = "config.evals.s: compares training with held-out data, and --reference is"
    test = "{'name': 'digits', 'split': 'test'}"
    for reference in (samples, test):
        with pytest.raises(evaluate_files.LeftOut, match=said):
            evaluate_files.run(samples=samples, reference=reference, evals={"s": block})
    out = evaluate_files.run(
        samples=samples, reference=samples, evals={"s": block, "q": PIXELS}
    )
    found = json.loads((out / "evaluation.json").read_text())
    assert set(found["evals"]) == {"q"} and set(found["left_out"]) == {"s"}
    assert f"left out: {said}" in capsys.readouterr().out


def test_reference_of_an_evaluator_takes_the_place_of_the_other(
    samples, digits, tmp_path, capsys
):
    """That is said, and a baseline of --reference is then no set against itself."""
    rows = digits[0].reshape(1797, -1).astype(np.float64)
    path = str(tmp_path / "stats.npz")
    np.savez(path, mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    out = evaluate_files.run(
        samples=samples, reference=samples,
        evals=quality(reference=path, baseline="train"),
    )  # fmt: skip
    said = f"config.evals.quality.reference: '{path}' takes the place of --reference"
    assert f"note: {said}\n" in capsys.readouterr().out
    one = json.loads((out / "evaluation.json").read_text())["evals"]["quality"]
    assert one["notes"]["settings"] == said
    exact = distance((digits[0][:200] - 1) / 2, digits[0])
    assert one["numbers"] == pytest.approx(
        {"frechet": exact, "frechet_real": exact}, rel=1e-6
    )
    evaluate_files.run(samples=samples, reference=path, evals=quality(reference=path),
                       out=tmp_path / "same")  # fmt: skip
    assert "takes the place" not in capsys.readouterr().out


def test_dropped_classes_are_said_once_whatever_the_label(
    samples, digits, tmp_path, capsys
):
    reference = str(tmp_path / "real.npz")
    np.savez(reference, x=digits[0][:300])
    out = evaluate_files.run(
        samples=samples, reference=reference, evals={"samples": PIXELS, "b": PIXELS}
    )
    assert capsys.readouterr().out.count("note: the classes of the samples (10)") == 1
    found = json.loads((out / "evaluation.json").read_text())["evals"]
    for label in ("samples", "b"):
        said = found[label]["notes"]["samples"]
        assert said.startswith("the classes of the samples (10) are not those")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raises:
    """An evaluator that finds something wrong, in words or in numpy."""

    kind: str

    def __call__(self, context):
        if self.kind == "numpy":
            np.zeros(2) + np.zeros(3)
        raise {"value": ValueError, "file": FileNotFoundError}[self.kind]("x: wrong")


@pytest.mark.parametrize("kind, said", [
    ("value", "x: wrong"),
    ("file", "x: wrong"),
    ("numpy", "operands could not be broadcast"),
])  # fmt: skip
def test_error_of_an_evaluator_names_it_and_keeps_its_place(samples, kind, said):
    evals = {"a": {"name": f"{__name__}:Raises", "kind": kind}}
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        evaluate_files.run(samples=samples, reference=samples, evals=evals)
    assert str(raised.value).startswith(f"config.evals.a: {said}")
    # The program shows numpy's with its traceback, which it knows by the last frame.
    assert raised.traceback[-1].name == "__call__"


def test_evaluator_that_draws_gets_the_file(samples, tmp_path):
    """`samples` tells the halved digits from the data; both splits are there."""
    out = evaluate_files.run(
        samples=samples, reference="digits", evals={"s": {"name": "samples"}}
    )
    found = json.loads((out / "evaluation.json").read_text())["evals"]["s"]
    assert found["settings"]["num_samples"] == 200
    assert found["numbers"]["agreement_real"] > 0.95
    assert found["numbers"]["nearest_train_ratio"] > 1
    assert (out / "evals" / "s_classes.png").is_file()


def test_other_shapes_need_a_network_that_resizes(samples, tmp_path, digits):
    large = str(tmp_path / "large.npz")
    np.savez(large, x=digits[0][:50].repeat(2, 1).repeat(2, 2))
    with pytest.raises(ValueError) as raised:
        evaluate_files.run(samples=samples, reference=large, evals=quality())
    assert "shape (8, 8, 1), the reference (16, 16, 1); give one" in str(raised.value)
    plain = {"s": {"name": "paired_images"}}
    with pytest.raises(ValueError, match="a feature network that resizes"):
        evaluate_files.run(samples=samples, reference=large, evals=plain)
    assert not (tmp_path / "mine_evaluation").exists()
    resizing = {"name": f"{__name__}:Brightness"}
    evaluate_files.run(
        samples=samples, reference=large, evals=quality(extractor=resizing)
    )


class Brightness:
    """Mean and spread of an image of any size."""

    outputs = ("features",)

    def check(self, spec):
        pass

    def load(self, room):
        from diffusionlab.features.base import Network

        return Network({}, _brightness, lambda x: x, {"network": "brightness"})


def _brightness(params, x):
    rows = x.reshape(len(x), -1)
    return {"features": jax.numpy.stack([rows.mean(1), rows.std(1)], 1)}


def test_pairs_are_compared_in_the_order_of_the_files(samples, tmp_path, digits):
    reference = str(tmp_path / "real.npz")
    np.savez(reference, x=digits[0][:200])
    pairs = {"pairs": {"name": "paired_images", "paired_metrics": [{"name": "psnr"}]}}
    out = evaluate_files.run(samples=samples, reference=reference, evals=pairs)
    found = json.loads((out / "evaluation.json").read_text())["evals"]["pairs"]
    error = ((digits[0][:200] + 1) / 2).astype(np.float64) ** 2
    exact = np.mean(10 * np.log10(4 / error.reshape(200, -1).mean(1)))
    assert found["numbers"]["psnr"] == pytest.approx(exact, rel=1e-6)
    assert (out / "evals" / "pairs_lowest_psnr.png").is_file()
    np.savez(reference, x=digits[0][:150])
    with pytest.raises(ValueError, match="200 samples and 150 examples"):
        evaluate_files.run(
            samples=samples, reference=reference, evals=pairs, out=tmp_path / "o"
        )


def test_missing_weights_are_named_before_anything_is_written(samples, tmp_path):
    inception = quality(extractor={"name": "inception"})
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        evaluate_files.run(samples=samples, reference="digits", evals=inception)
    assert str(raised.value).startswith("config.evals.quality.extractor.path: ")
    assert not (tmp_path / "mine_evaluation").exists()
