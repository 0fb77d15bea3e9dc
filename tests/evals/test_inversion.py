import numpy as np
import pytest

from diffusionlab.evals import inversion
from diffusionlab.processes.gaussian import Gaussian
from diffusionlab.samplers.ancestral import Ancestral
from diffusionlab.samplers.bases import DctBlock, Oracle
from diffusionlab.samplers.covariance import Covariance
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.samplers.edm import Euler
from diffusionlab.samplers.probability_flow import ProbabilityFlow
from diffusionlab.schedules.cosine import Cosine

PROCESS = Gaussian(schedule=Cosine(), prediction="v")
THREE = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])


def test_round_trips_improve_with_the_steps_and_codes_are_gaussian(exact_context):
    context = exact_context(PROCESS, THREE, 0.2, num_classes=3, number=300)
    evaluator = inversion.Inversion(num_steps=(40, 80), num_examples=300)
    result = evaluator(context)
    numbers = result.numbers
    # DDIM is of order 1 both ways.
    ratio = numbers["round_trip/40"] / numbers["round_trip/80"]
    assert ratio == pytest.approx(2, rel=0.15)
    # 600 entries: standard errors 0.04 and 0.06, and the error of 80 steps.
    assert numbers["code_mean/80"] == pytest.approx(0, abs=0.15)
    assert numbers["code_variance/80"] == pytest.approx(1, abs=0.3)
    assert result.pictures["round_trip"].shape[2] == 3


def test_images_are_shown_with_every_number_of_steps(exact_context):
    context = exact_context(PROCESS, np.zeros((1, 4, 4, 1)), 0.5, number=20)
    evaluator = inversion.Inversion(num_steps=(4,), num_examples=8, num_shown=3)
    picture = evaluator(context).pictures["round_trip"]
    # data, code, one number of steps; three rows.
    assert picture.shape[1] == pytest.approx(picture.shape[0] - 24, abs=8)


def test_given_samplers_are_used_and_random_ones_refused(exact_context):
    context = exact_context(PROCESS, THREE, 0.2, number=30)
    given = inversion.Inversion(sampler=Ddim(num_steps=1), num_steps=(4,))
    plain = inversion.Inversion(num_steps=(4,))
    assert given(context).numbers == plain(context).numbers
    noisy = inversion.Inversion(sampler=Ancestral(num_steps=1), num_steps=(4,))
    for check in (lambda: noisy.check_process(PROCESS), lambda: noisy(context)):
        with pytest.raises(ValueError, match="sampler: Ancestral draws fresh noise"):
            check()
    with pytest.raises(ValueError, match="num_steps: expected numbers"):
        inversion.Inversion(num_steps=(0,))
    for field in ("num_examples", "num_shown"):
        with pytest.raises(ValueError, match=f"{field}: must be at least 1"):
            inversion.Inversion(**{field: 0})


def test_every_number_of_steps_is_tried():
    """Two steps stop at t = 1/2, where sigma / alpha is 1; three do not."""
    churning = Euler(num_steps=1, churn=1.0, churn_min=0.9, churn_max=1.1)
    inversion.Inversion(sampler=churning, num_steps=(3,)).check_process(PROCESS)
    with pytest.raises(ValueError, match="sampler: Euler draws fresh noise"):
        inversion.Inversion(sampler=churning, num_steps=(2, 3)).check_process(PROCESS)


def test_samplers_are_tried_on_a_shape_that_suits_them():
    """One that suits none of these is tried when it runs."""
    images = Covariance(num_steps=1, basis=DctBlock(block=4))
    with pytest.raises(ValueError, match="sampler: Covariance draws fresh noise"):
        inversion.Inversion(sampler=images, num_steps=(2,)).check_process(PROCESS)
    other = Covariance(num_steps=1, basis=Oracle(num_products=2))
    inversion.Inversion(sampler=other, num_steps=(2,)).check_process(PROCESS)


def test_an_adaptive_sampler_returns_the_data(exact_context):
    context = exact_context(PROCESS, np.eye(3), 0.2, num_classes=3, number=30)
    evaluator = inversion.Inversion(sampler=ProbabilityFlow(), num_steps=(1,))
    # Errors of 1e-5 a step, up and down, times the stretch between code and data.
    assert evaluator(context).numbers["round_trip/1"] < 1e-3
