import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab import samplers
from diffusionlab.evals import sampler_comparison
from diffusionlab.evals.sampler_comparison import SamplerComparison
from diffusionlab.features import pixels
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers import base
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
THREE = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])


@pytest.fixture
def context(exact_context):
    return exact_context(PROCESS, THREE, 0.2, num_classes=3, number=300)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twice:
    """Two evaluations a step, one of them a Jacobian-vector product, as it says."""

    num_steps: int
    grid: None = None

    times, init, final = base.times, base.init, base.final
    num_evaluations = property(lambda self: 2 * self.num_steps)
    num_predictions = property(lambda self: self.num_steps)

    def step(self, process, predict, state, t, s, keys):
        return Ddim(num_steps=1).step(process, predict, state, t, s, keys)


class Counted(NamedTuple):
    """A state that counts, as of an adaptive sampler."""

    z: jax.Array
    x: jax.Array
    evaluations: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
    """DDIM that counts: ten evaluations more in each step for a small tolerance."""

    num_steps: int = 4
    rtol: float = 1e-2
    atol: float = 1e-2
    grid: None = None

    times, final = base.times, base.final
    num_evaluations = None

    def init(self, z, t):
        return Counted(z, z, jnp.zeros(len(z), jnp.int32))

    def step(self, process, predict, state, t, s, keys):
        z, x = Ddim(num_steps=1).step(process, predict, state, t, s, keys)
        return Counted(z, x, state.evaluations + (11 if self.rtol < 1e-2 else 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refuses:
    """Works nowhere."""

    num_steps: int
    grid: None = None

    times, num_evaluations = base.times, base.one_per_step

    def check(self, process, spec):
        raise ValueError("name: works nowhere.")


def shifted(context, by=(3.0, 4.0)):
    """A context that draws the held-out examples themselves, moved."""

    def draw(number, sampler):
        return context.test.x[:number] + np.float32(by), context.test.label[:number]

    return context._replace(
        draw=draw,
        apply=lambda function, params, x: jax.device_get(function(params, x)),
    )


@pytest.mark.parametrize(
    ("extractor", "shift"), [(None, 5.0), (pixels.Pixels(), 25.0)], ids=["d", "d²"]
)
def test_a_shift_is_the_distance_of_the_data_and_the_square_of_features(
    context, extractor, shift
):
    evaluator = SamplerComparison(
        samplers=(Ddim(num_steps=1),),
        num_evaluations=(2,),
        num_samples=300,
        extractor=extractor,
    )
    evaluator.check(context.test)
    result = evaluator(shifted(context))
    assert result.numbers["ddim/2/frechet"] == pytest.approx(shift, rel=1e-5)
    low, high = result.intervals["ddim/2/frechet"]
    # Classes come in turn, so each group has its mean from spread 0.2 in the direction
    # of the shift: the standard error of d is 0.2 / 300^1/2, of d² 10 times that, and
    # the interval 2.26 of them to each side; ten groups tell it to a quarter.
    width = (high - low) / (1 if extractor is None else 10)
    assert low < shift < high
    assert width == pytest.approx(2 * 2.26 * 0.2 / 300**0.5, rel=0.5)
    assert set(result.intervals) == {"ddim/2/frechet", "real/frechet"}
    meant = "features, d²" if extractor else "the data, d"
    assert result.notes["frechet"].endswith(meant)
    about = result.provenance
    assert about["reference"] == {"name": "held-out data", "num": 300}
    assert about["network"]["network"] == (
        "pixels" if extractor else "the data themselves"
    )
    without = dataclasses.replace(evaluator, groups=0)(shifted(context))
    assert without.numbers == result.numbers and not without.intervals


def test_many_features_and_few_samples_have_no_interval(context, monkeypatch):
    evaluator = SamplerComparison(
        samplers=(Ddim(num_steps=1),), num_evaluations=(2,), num_samples=40
    )

    def found(groups):
        again = dataclasses.replace(evaluator, groups=groups)
        return set(again(shifted(context)).intervals)

    assert found(10) == {"ddim/2/frechet", "real/frechet"}
    assert not found(50)
    monkeypatch.setattr(sampler_comparison, "_MAX_JACKKNIFE", 1)
    assert not found(10)


def test_more_evaluations_are_better_and_real_data_best(exact_context, capsys):
    context = exact_context(PROCESS, 0.3 * THREE, 0.5, num_classes=3, number=300)
    evaluator = SamplerComparison(
        samplers=(Ddim(num_steps=1), Ancestral(num_steps=1, noise_exponent=1.0)),
        num_evaluations=(2, 32),
        num_samples=300,
    )
    result = evaluator(context)
    numbers = result.numbers
    names = ("ddim", "ancestral, noise_exponent=1.0")
    for name in names:
        assert numbers[f"{name}/32/frechet"] < 0.5 * numbers[f"{name}/2/frechet"]
    assert numbers["real/frechet"] < numbers["ddim/2/frechet"]
    assert len(numbers) == 2 * (1 + 4)
    assert set(result.pictures) == {"frechet", "agreement"}
    said = capsys.readouterr().out
    assert "1 of 4, ddim, 2 evaluations; the first one" in said
    assert "4 of 4, ancestral, noise_exponent=1.0, 32 evaluations; about" in said


def test_jacobian_products_are_counted_and_not_counted(context):
    evaluator = SamplerComparison(
        samplers=(Twice(num_steps=1),), num_evaluations=(1, 5), num_samples=90
    )
    result = evaluator(context)
    numbers = result.numbers
    counted = numbers["Twice/4/frechet"]
    assert numbers["Twice (Jacobian products free)/2/frechet"] == counted
    assert numbers["Twice/4/agreement"] > 0.95
    assert not any(name.startswith("Twice/1/") for name in numbers)


def test_adaptive_samplers_stand_at_their_measured_count(context):
    evaluator = SamplerComparison(
        samplers=(Adaptive(),), tolerances=(1e-1, 1e-3), num_samples=60
    )
    numbers = evaluator(context).numbers
    assert numbers["Adaptive/4/frechet"] == numbers["Adaptive/44/frechet"]


def test_tolerances_with_one_measured_count_are_both_there(context):
    evaluator = SamplerComparison(
        samplers=(Adaptive(),), tolerances=(0.2, 0.1), num_samples=60
    )
    result = evaluator(context)
    found = {n for n in result.numbers if n.endswith("frechet")}
    assert found == {
        "real/frechet",
        *(f"Adaptive/4{s}/frechet" for s in ("", " (0.1)")),
    }


def test_an_adaptive_sampler_that_guidance_refuses_is_listed(context):
    def draw(number, sampler):
        if isinstance(sampler, Adaptive):
            raise ValueError("config.guidance.cads: not this one.")
        return context.draw(number, sampler)

    evaluator = SamplerComparison(
        samplers=(Adaptive(), Ddim(num_steps=1)), num_evaluations=(2,), num_samples=60
    )
    result = evaluator(context._replace(draw=draw))
    assert result.notes["refused: Adaptive"] == "config.guidance.cads: not this one."
    assert "ddim/2/frechet" in result.numbers

    def broken(number, sampler):
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        evaluator(context._replace(draw=broken))


def test_samplers_that_cannot_work_are_listed_with_their_reason(context):
    evaluator = SamplerComparison(
        samplers=(Refuses(num_steps=1), Twice(num_steps=1)),
        num_evaluations=(1,),
        num_samples=60,
    )
    result = evaluator(context)
    assert result.notes["refused: Refuses"] == "name: works nowhere."
    assert result.notes["refused: Twice"] == "needs more than 1"
    assert {name.partition("/")[0] for name in result.numbers} == {"real"}


def test_every_registered_sampler_is_found(exact_context):
    """Without labels and without drawing: only the plan."""
    context = exact_context(PROCESS, THREE, 0.2)
    points, refused = SamplerComparison(num_evaluations=(8,))._points(context)
    known = {n for n in samplers.REGISTRY["sampler"] if not n.startswith("token_")}
    assert {p.label for p in points} | set(refused) == known
    for point in points:
        assert point.count is None or point.count <= 8
        if point.count is not None:
            more = dataclasses.replace(
                point.sampler, num_steps=point.sampler.num_steps + 1
            )
            assert more.num_evaluations > 8
    assert {"ddim", "ancestral"} <= {p.label for p in points}


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
def test_runaway_samples_are_bad_and_break_nothing(context, value):
    def draw(number, sampler):
        return np.full((number, 2), value, np.float32), np.zeros(number, np.int32)

    evaluator = SamplerComparison(
        samplers=(Ddim(num_steps=1),), num_evaluations=(2,), num_samples=60
    )
    numbers = evaluator(context._replace(draw=draw)).numbers
    assert 1e5 < numbers["ddim/2/frechet"] < 1e7


def test_what_does_not_fit_is_refused(exact_context):
    wide = exact_context(PROCESS, np.zeros((1, 2000)), 0.5, number=2).test
    with pytest.raises(ValueError, match="at most 1024 dimensions.* have 2000"):
        SamplerComparison().check(wide)
    SamplerComparison(extractor=pixels.Pixels()).check(wide)
    huge = exact_context(PROCESS, np.zeros((1, 9000)), 0.5, number=2).test
    with pytest.raises(ValueError, match=r"^extractor\.name: .*the data have 9000"):
        SamplerComparison(extractor=pixels.Pixels()).check(huge)
    for field, value in (
        ("num_evaluations", ()),
        ("num_evaluations", (0,)),
        ("tolerances", (0.0,)),
        ("num_samples", 1),
        ("groups", 1),
    ):
        with pytest.raises(ValueError, match=f"^{field}: "):
            SamplerComparison(**{field: value})
