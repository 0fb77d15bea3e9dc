import numpy as np
import pytest

from diffusionlab.evals import image_to_image
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.schedules.cosine import Cosine

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
THREE = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])


def test_the_distance_of_a_gaussian_is_exact(exact_context):
    """E (x' - x)² = 2 c (1 - alpha sqrt(c / (alpha² c + sigma²)))."""
    std, number = 0.5, 2000
    context = exact_context(
        PROCESS, np.zeros((1, 2)), std, number=number, sampler=Ddim(num_steps=64)
    )
    evaluator = image_to_image.ImageToImage(
        start_times=(0.25, 0.75), num_examples=number
    )
    numbers = evaluator(context).numbers
    for start in evaluator.start_times:
        alpha, sigma = (
            float(q) for q in PROCESS.schedule.alpha_sigma(np.float32(start))
        )
        share = std * alpha / np.sqrt((alpha * std) ** 2 + sigma**2)
        exact = std * np.sqrt(2 * (1 - share))
        # 4,000 values: standard error 1.1 % of the rms, and 1 % for the steps.
        assert numbers[f"distance/{start:g}"] == pytest.approx(exact, rel=0.045)
    assert numbers["distance_other"] == pytest.approx(std * 2**0.5, rel=0.045)


def test_another_label_turns_examples_into_that_class(exact_context):
    context = exact_context(
        PROCESS, THREE, 0.1, num_classes=3, number=60, sampler=Ddim(num_steps=20)
    )
    evaluator = image_to_image.ImageToImage(start_times=(0.1, 1.0), label=1)
    function = image_to_image.edit(context.sampler, PROCESS, 1.0)
    label, index = np.full(60, 1, np.int32), np.arange(60, dtype=np.int32)
    found = context.compute(function, context.test.x, label, index)
    # Far away from the other two, 1.3 and 1.6 off.
    assert np.linalg.norm(found - THREE[1], axis=1).max() < 0.6
    result = evaluator(context)
    assert result.numbers["distance/0.1"] < result.numbers["distance/1"]
    assert result.pictures["edits"].shape[1] == 3 * 280
    with pytest.raises(ValueError, match="label: expected one of 3 classes, got 3"):
        image_to_image.ImageToImage(label=3).check(context.test)


def test_images_are_shown_beside_their_source(exact_context):
    context = exact_context(
        PROCESS, np.zeros((1, 4, 4, 1)), 0.5, number=8, sampler=Ddim(num_steps=4)
    )
    evaluator = image_to_image.ImageToImage(start_times=(0.5,), num_shown=4)
    picture = evaluator(context).pictures["edits"]
    assert picture.shape[0] - 24 == pytest.approx(2 * picture.shape[1], abs=8)


def test_what_does_not_fit_is_refused():
    for times in ((), (0.0,), (1.5,)):
        with pytest.raises(ValueError, match="start_times: expected times"):
            image_to_image.ImageToImage(start_times=times)
    with pytest.raises(ValueError, match="num_examples: must be at least 2"):
        image_to_image.ImageToImage(num_examples=1)
