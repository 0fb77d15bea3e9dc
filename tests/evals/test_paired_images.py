import dataclasses

import numpy as np
import pytest

from diffusionlab import registry, types
from diffusionlab.evals.paired_images import PairedImages
from diffusionlab.metrics.psnr import Psnr
from diffusionlab.metrics.ssim import ssim

NUM = 12
TRUTH = np.random.default_rng(0).uniform(-0.5, 0.5, (NUM, 16, 16, 1)).astype(np.float32)
OFFSET = np.linspace(0.01, 0.12, NUM, dtype=np.float32)[:, None, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offset:
    """The largest difference of each pair."""

    def check(self, spec):
        if spec.shape[0] != 16:
            raise ValueError("size: is not 16.")

    def prepare(self, room):
        assert room == "a room"
        return lambda x, y: np.abs(x - y).reshape(len(x), -1).max(1)


class Source:
    def __init__(self, x):
        self.x, self.spec = x, types.DataSpec(x.shape[1:])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index]}


def context(samples, truth=TRUTH, *, about=None, batch=5):
    def stream(num, start=0):
        for first in range(start, min(num, len(samples)), batch):
            x = samples[first : min(first + batch, num)]
            yield x, np.zeros(len(x), np.int32)

    nothing = dict.fromkeys(
        ("draw", "loss", "predict", "compute", "process", "sampler")
    )
    source = Source(truth)
    return types.EvalContext(
        step=1,
        spec=source.spec,
        train=Source(truth[::-1]),
        test=source,
        stream=stream,
        room="a room",
        about={"num_in_file": len(samples)} if about is None else about,
        **nothing,
    )


def paired(**options):
    return PairedImages(**{"paired_metrics": (Offset(),), "split": "test", **options})


@pytest.mark.parametrize("batch", [1, 5, 50])
def test_pairs_are_compared_in_order_whatever_the_batches(batch):
    """The mean offset and its standard error are those of OFFSET."""
    result = paired()(context(TRUTH + OFFSET, batch=batch))
    mean, error = OFFSET.mean(), 1.96 * OFFSET.std(ddof=1) / NUM**0.5
    # Values of up to 0.62 in float32: 6e-8 each.
    assert result.numbers == {"offset": pytest.approx(mean, abs=1e-7)}
    expected = (mean - error, mean + error)
    assert result.intervals == {"offset": pytest.approx(expected, abs=1e-7)}
    assert result.provenance["samples"]["num"] == NUM


def test_default_metrics_are_psnr_and_ssim_of_known_pairs():
    evaluator = PairedImages(split="test")
    result = evaluator(context(TRUTH + OFFSET))
    # Range 2 and the constant error c: 20 log10(2 / c) decibels.
    exact = float(np.mean(20 * np.log10(2 / OFFSET)))
    assert result.numbers["psnr"] == pytest.approx(exact, rel=1e-5)
    exact = float(np.mean(ssim(TRUTH + OFFSET, TRUTH)))
    assert result.numbers["ssim"] == pytest.approx(exact, rel=1e-12)
    assert set(result.intervals) == set(result.numbers) == {"psnr", "ssim"}
    assert set(result.pictures) == {"lowest_psnr", "highest_psnr"}
    same = evaluator(context(TRUTH)).numbers
    assert same["ssim"] == pytest.approx(1.0, abs=1e-6) and same["psnr"] == Psnr().cap


def test_other_split_is_another_order():
    numbers = paired(split="train")(context(TRUTH[::-1])).numbers
    assert numbers == {"offset": 0.0}
    assert paired(split="train")(context(TRUTH)).numbers["offset"] > 0.5


def test_pictures_show_the_pairs_at_both_ends(monkeypatch):
    shown = {}

    def record(x, y, columns, *, caption):
        shown[caption] = np.abs(x - y).reshape(len(x), -1).max(1)
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr("diffusionlab.pictures.pairs", record)
    order = np.random.default_rng(1).permutation(NUM)
    paired(num_shown=3)(context((TRUTH + OFFSET)[order], TRUTH[order]))
    lowest, highest = shown.values()
    np.testing.assert_allclose(lowest, [0.01, 0.02, 0.03], atol=1e-6)
    np.testing.assert_allclose(highest, [0.12, 0.11, 0.10], atol=1e-6)
    assert [c.split(":")[0] for c in shown] == ["lowest offset", "highest offset"]


@pytest.mark.parametrize("there", [NUM - 1, NUM + 2])
def test_unequal_numbers_are_refused_unless_a_number_is_given(there):
    samples = np.resize(TRUTH, (there, 16, 16, 1))
    with pytest.raises(ValueError, match=f"{there} samples and {NUM} examples"):
        paired()(context(samples))
    assert paired(num_samples=4)(context(samples)).numbers == {"offset": 0.0}
    with pytest.raises(ValueError, match="30 pairs were asked for, and there are"):
        paired(num_samples=30)(context(samples))


def test_a_run_draws_as_many_as_the_reference_has():
    assert paired()(context(TRUTH, about={"run": "x"})).numbers == {"offset": 0.0}
    with pytest.raises(ValueError, match="12 pairs expected, 7 samples came"):
        paired()(context(TRUTH[:7], about={"run": "x"}))


def test_pairs_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(8, 16, 1\), the reference \(16, 16"):
        paired()(context(TRUTH[:, :8]))


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(num_samples=1), "num_samples: must be 0"),
        (dict(split="valid"), "split: expected 'train' or 'test', got 'valid'"),
        (dict(num_shown=0), "num_shown: must be at least 1"),
        (dict(paired_metrics=(Psnr(), Psnr())), "one is there twice: psnr, psnr"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        PairedImages(**options)


def test_check_names_the_metric_that_cannot_work():
    paired().check(Source(TRUTH))
    with pytest.raises(ValueError, match=r"^paired_metrics\[0\]\.size: is not 16"):
        paired().check(Source(TRUTH[:, :8]))
    with pytest.raises(ValueError, match="^name: .* takes images"):
        paired().check(Source(TRUTH[:, 0, :, 0]))


def test_config_lists_metrics_as_blocks():
    block = {
        "name": "paired_images",
        "paired_metrics": [{"name": "psnr", "cap": 50.0}, {"name": "ssim"}],
    }
    built = registry.build("evaluator", block, "config.evals.pairs")
    assert built.paired_metrics[0] == Psnr(cap=50.0)
    block["paired_metrics"][1]["name"] = "sim"
    with pytest.raises(ValueError, match=r"pairs\.paired_metrics\[1\]\.name: unknown"):
        registry.check("evaluator", block, "config.evals.pairs")
