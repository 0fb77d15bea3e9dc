import numpy as np
import pytest

from diffusionlab.evals import inpainting
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.samplers.probability_flow import ProbabilityFlow
from diffusionlab.schedules.cosine import Cosine

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
DRAWN = Ancestral(num_steps=32)


@pytest.mark.parametrize(
    ("mask", "fraction", "hidden"),
    [
        ("left", 0.5, np.s_[:, :2]),
        ("right", 0.25, np.s_[:, 3:]),
        ("top", 0.5, np.s_[:2]),
        ("bottom", 0.25, np.s_[3:]),
        ("centre", 0.25, np.s_[1:3, 1:3]),
    ],
)
def test_masks_hide_what_they_say(mask, fraction, hidden):
    expected = np.zeros((4, 4, 3), bool)
    expected[hidden] = True
    evaluator = inpainting.Inpainting(mask=mask, fraction=fraction)
    np.testing.assert_array_equal(evaluator.hidden((4, 4, 3)), expected)


def test_random_masks_hide_a_share_of_whole_pixels_or_of_entries():
    hidden = inpainting.Inpainting(mask="random", fraction=0.25).hidden((4, 4, 3))
    assert hidden[..., 0].sum() == 4
    assert (hidden == hidden[..., :1]).all()
    assert inpainting.Inpainting(fraction=0.5).hidden((6,)).sum() == 3
    first = inpainting.Inpainting(mask="first", fraction=0.5).hidden((4,))
    assert first.tolist() == [True, True, False, False]


def test_statistics_by_hand():
    x = np.array([[1.0, 2.0]])
    fills = np.array([[[1.5, 4.0], [1.5, 6.0]]])
    found = inpainting.statistics(x, fills, np.array([False, True]))
    assert found == pytest.approx(
        {
            "known_error": 0.5,
            "hidden_error": np.sqrt((4 + 16) / 2),
            "hidden_error_mean": 3.0,
            "spread": np.sqrt(2),
        }
    )


@pytest.mark.parametrize("method", ["replacement", "reconstruction"])
def test_independent_entries_are_filled_from_their_own_law(method, exact_context):
    """Then a fill knows nothing: hidden_error is sqrt 2 times the std of the data."""
    std = 0.5
    context = exact_context(PROCESS, np.zeros((1, 2)), std, number=1000, sampler=DRAWN)
    evaluator = inpainting.Inpainting(method=method, num_examples=1000)
    numbers = evaluator(context).numbers
    # 4,000 fills of 1,000 numbers: 1 % and 2 %, and the steps' own error.
    assert numbers["spread"] == pytest.approx(std, rel=0.08)
    assert numbers["hidden_error"] == pytest.approx(std * 2**0.5, rel=0.1)
    assert numbers["known_error"] < 0.1


@pytest.mark.parametrize("method", ["replacement", "reconstruction"])
def test_the_known_entry_says_which_component_it_is(method, exact_context):
    """Components at (1, 1) and (-1, -1), narrow: one coordinate gives the other."""
    means = np.array([[1.0, 1.0], [-1.0, -1.0]])
    context = exact_context(PROCESS, means, 0.1, number=200, sampler=DRAWN)
    evaluator = inpainting.Inpainting(
        method=method, resample=4, mask="first", num_examples=200
    )
    result = evaluator(context)
    # At random half of the signs would be wrong, and the error 1.4. The
    # guidance is weak at high noise, where the sign is decided; see `inverse.py`.
    limit = {"replacement": 0.4, "reconstruction": 1.2}[method]
    assert result.numbers["hidden_error"] < limit
    assert result.pictures["fills"].shape == (360, 1080, 3)


def test_what_is_hidden_is_not_used(exact_context):
    context = exact_context(PROCESS, np.zeros((1, 4, 4, 1)), 0.5, sampler=DRAWN)
    evaluator = inpainting.Inpainting(mask="left", sampler=Ddim(num_steps=4))
    seen = []

    def compute(function, given, *rest, guided):
        seen.append(given)
        return given

    evaluator(context._replace(compute=compute))
    assert not seen[0][:, :, :2].any() and seen[0][:, :, 2:].all()
    picture = evaluator(context._replace(compute=compute)).pictures["fills"]
    assert picture.shape[0] > picture.shape[1], "ten rows of six columns"


def test_what_does_not_fit_is_refused(exact_context):
    vectors = exact_context(PROCESS, np.zeros((1, 2)), 0.5, number=4).test
    with pytest.raises(ValueError, match=r"mask: 'left' does not suit .* first or ran"):
        inpainting.Inpainting(mask="left").check(vectors)
    with pytest.raises(ValueError, match="fraction: 0.9 of data .* hides everything"):
        inpainting.Inpainting(mask="first", fraction=0.9).check(vectors)
    for field, value in (
        ("mask", "middle"),
        ("method", "magic"),
        ("fraction", 1.0),
        ("resample", 0),
        ("num_examples", 0),
        ("num_draws", 1),
        ("num_shown", 0),
        ("weight", 0.0),
    ):
        with pytest.raises(ValueError, match=f"^{field}: "):
            inpainting.Inpainting(**{field: value})


def test_replacement_at_few_stops_of_an_adaptive_sampler_is_refused(exact_context):
    context = exact_context(PROCESS, np.zeros((1, 2)), 0.5, number=4)
    few, many = (ProbabilityFlow(num_steps=number) for number in (7, 8))
    said = "sampler.num_steps: ProbabilityFlow .* at least 8, got 7"
    with pytest.raises(ValueError, match=said):
        inpainting.Inpainting(sampler=few).check(context.test)
    with pytest.raises(ValueError, match=said):
        inpainting.Inpainting()(context._replace(sampler=few))
    inpainting.Inpainting(sampler=many).check(context.test)
    inpainting.Inpainting(sampler=few, method="reconstruction").check(context.test)
