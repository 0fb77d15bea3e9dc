"""Metrics on the features of streamed samples, with what they were computed from."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.evals.sample_quality import SampleQuality
from diffusionlab.features.base import Room
from diffusionlab.features.digits import Digits
from diffusionlab.features.pixels import Pixels
from diffusionlab.metrics.frechet import Frechet
from diffusionlab.metrics.inception_score import InceptionScore
from diffusionlab.metrics.neighbours import PrecisionRecall


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """400 draws of N(mean, I) in four dimensions, in three classes."""

    split: str = "train"

    @property
    def spec(self):
        return types.DataSpec((4,), 3)

    def __len__(self):
        return 400

    def __getitem__(self, index):
        seed = 1000 if self.split == "test" else 0
        x = np.random.default_rng(seed + index).normal(size=4)
        return {"x": x.astype(np.float32), "label": np.int32(index % 3)}


def samples(num, mean=3.0):
    return mean + np.random.default_rng(7).normal(size=(num, 4)).astype(np.float32)


@pytest.fixture
def context(tmp_path):
    """`context(drawn)`: an EvalContext whose samples are `drawn`, in batches of 50."""

    def make(drawn, asked=None):
        def stream(num, start=0, sampler=None, sobol=False):
            if asked is not None:
                asked.append((num, start, sobol))
            for first in range(start, num, 50):
                last = min(first + 50, num)
                yield drawn[first:last], np.arange(first, last, dtype=np.int32) % 3

        return types.EvalContext(
            step=1,
            spec=Gaussian().spec,
            train=Gaussian(),
            test=Gaussian(split="test"),
            draw=None,
            loss=None,
            predict=None,
            compute=None,
            process=None,
            sampler=None,
            stream=stream,
            apply=lambda f, params, x: jax.device_get(f(params, x)),
            room=Room(pathlib.Path(tmp_path), None),
            scratch=tmp_path / "scratch",
            about={"run": "runs/x", "step": 1, "ema": "main"},
        )

    return make


def quality(**options):
    chosen = dict(
        extractor=Pixels(), metrics=(Frechet(),), num_samples=400, reference="test"
    )
    return SampleQuality(**{**chosen, **options})


def test_numbers_are_those_of_the_metric_on_the_features(context):
    drawn = samples(400)
    found = quality(baseline="train")(context(drawn))
    # Means 3 apart in four dimensions: 36, plus what 400 draws add.
    assert found.numbers["frechet"] == pytest.approx(36, rel=0.05)
    low, high = found.intervals["frechet"]
    assert low < found.numbers["frechet"] < high
    # d + d (d + 1) / 4 over N, of either side, is what real data get; see the metric.
    assert 0 < found.numbers["frechet_real"] < 4 * 2 * 9 / 400
    low, high = found.intervals["frechet_real"]
    assert low < found.numbers["frechet_real"] < high


def test_every_number_says_what_it_was_computed_from(context):
    found = quality(baseline="train")(context(samples(400)))
    about = found.provenance
    assert about["samples"]["num"] == 400 and about["samples"]["run"] == "runs/x"
    assert about["reference"] == {
        "name": "test data of Gaussian",
        "num": 400,
        "sha256": about["reference"]["sha256"],
    }
    assert about["baseline"]["name"] == "train data of Gaussian"
    assert about["network"] == {"network": "pixels"}
    assert len(about["samples"]["sha256"]) == len(about["reference"]["sha256"]) == 64
    other = quality()(context(samples(400, mean=2.0))).provenance
    assert "baseline" not in other


def test_an_interrupted_evaluation_draws_only_what_is_missing(context):
    drawn, asked = samples(400), []
    whole = quality()(context(drawn))
    broken = context(drawn, asked)

    def stop_early(*args, **kwargs):
        for number, batch in enumerate(broken.stream(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    broken = broken._replace(scratch=broken.scratch.parent / "other")
    with pytest.raises(KeyboardInterrupt):
        quality()(broken._replace(stream=stop_early))
    found = quality()(broken)
    assert [start for _, start, _ in asked] == [0, 150]
    assert found.numbers == whole.numbers
    assert found.provenance == whole.provenance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubled(Pixels):
    """Another network, of the same outputs and widths."""

    def load(self, room):
        network = super().load(room)
        double = lambda _, x: {"features": 2 * x}  # noqa: E731
        return network._replace(apply=double, about={"network": "doubled"})


@pytest.mark.parametrize("change", [dict(extractor=Doubled()), dict(sobol=True)])
def test_what_another_network_or_noise_left_is_not_gone_on_with(context, change):
    drawn, asked = samples(400), []
    whole = quality(**change)(context(drawn))

    def stop_early(*args, **kwargs):
        yield drawn[:50], np.zeros(50, np.int32)
        raise KeyboardInterrupt

    left = context(drawn, asked)
    left = left._replace(scratch=left.scratch.parent / "left")
    with pytest.raises(KeyboardInterrupt):
        quality()(left._replace(stream=stop_early))
    found = quality(**change)(left)
    assert [start for _, start, _ in asked] == [0]
    assert found.numbers == whole.numbers


def test_sobol_reaches_the_stream(context):
    asked = []
    quality(sobol=True)(context(samples(400), asked))
    assert asked == [(400, 0, True)]


def test_several_metrics_share_one_pass(context):
    asked = []
    chosen = (Frechet(), PrecisionRecall(k=3))
    found = quality(metrics=chosen)(context(samples(400, mean=0.0), asked))
    assert len(asked) == 1
    assert {"frechet", "precision", "recall"} <= set(found.numbers)
    assert found.numbers["precision"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metrics=(InceptionScore(),)), "metrics: InceptionScore needs"),
        (dict(metrics=(Frechet(), Frechet(groups=0))), "metrics: Frechet is there twi"),
        (dict(extractor=Digits()), "extractor.name: the extractor 'digits' takes"),
        (dict(reference="stats.npz"), "reference: expected 'train', 'test' or an .npz"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        quality(**options).check(Gaussian())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_samples=1), "num_samples: must be at least 2"),
        (dict(num_reference=-1), "num_reference: must be at least 0"),
        (dict(baseline="valid"), "baseline: expected 'train', 'test' or ''"),
        (dict(baseline="test"), "baseline: 'test' is the reference itself"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        quality(**options)


def test_samples_are_drawn_again_in_their_batches(context):
    drawn = samples(130)
    evaluator = quality(num_samples=130)
    found = evaluator._again(context(drawn), [3, 129, 55, 3])
    np.testing.assert_array_equal(found, drawn[[3, 129, 55, 3]])


def test_statistics_of_the_reference_are_written_once_and_read_again(context, tmp_path):
    drawn, file = samples(400), str(tmp_path / "statistics.npz")
    whole = quality(save_reference=file)(context(drawn))
    again = quality(save_reference=file)(context(drawn))
    assert again.numbers == whole.numbers
    found = quality(reference=file)(context(drawn))
    assert found.numbers["frechet"] == pytest.approx(whole.numbers["frechet"], rel=1e-9)
    assert found.provenance["reference"]["name"] == file
    with pytest.raises(ValueError, match="save_reference: .* holds other statistics"):
        quality(save_reference=file, reference="train")(context(drawn))


def test_statistics_are_refused_before_the_samples_are_drawn(context, tmp_path):
    drawn, file, asked = samples(400), str(tmp_path / "statistics.npz"), []
    quality(save_reference=file)(context(drawn))
    with pytest.raises(ValueError, match="metrics: PrecisionRecall needs the features"):
        quality(reference=file, metrics=(PrecisionRecall(),)).check(Gaussian())
    found = quality(reference=file, metrics=())(context(drawn)).numbers
    assert set(found) == {"frechet"}
    with pytest.raises(ValueError, match="of another network"):
        quality(reference=file, extractor=Doubled())(context(drawn, asked))
    with pytest.raises(ValueError, match="save_reference: expected a name that ends"):
        quality(save_reference="statistics")
    with pytest.raises(ValueError, match="save_reference: the reference is a file"):
        quality(reference=file, save_reference="other.npz")
    assert asked == []


def test_warnings_of_several_metrics_are_all_kept(context):
    few = quality(num_samples=4, metrics=(Frechet(groups=0), PrecisionRecall(k=1)))
    notes = few(context(samples(4))).notes
    assert "rank 3 at most" in notes["warning: frechet"]


@pytest.mark.parametrize(("num", "real"), [(100, 100), (400, 400), (500, 400)])
def test_real_data_are_as_many_as_the_samples_where_there_are(context, num, real):
    found = quality(num_samples=num, baseline="train")(context(samples(num)))
    assert found.provenance["baseline"]["num"] == real
    assert found.provenance["reference"]["num"] == 400
    said = found.notes.get("real data", "")
    assert said.startswith("400 examples stand for 500") if real < num else not said
