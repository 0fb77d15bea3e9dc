"""Drawn examples are functions of (seed, split, i), and the closed form is exact."""

import dataclasses

import numpy as np
import pytest

from diffusionlab.data import base, generated

MAKE = [
    generated.Mixture(size=50),
    generated.Generated(shape=(8, 8, 3), size=50),
]


def rows(source, num=50):
    return base.gather(source, np.arange(num))


@pytest.mark.parametrize("source", MAKE, ids=lambda s: type(s).__name__)
def test_example_i_is_a_function_of_seed_split_and_i(source):
    x = rows(source)["x"]
    longer = dataclasses.replace(source, size=80)
    np.testing.assert_array_equal(x, rows(longer)["x"])
    for change in ({"seed": 1}, {"split": "test"}):
        assert np.all(x != rows(dataclasses.replace(source, **change))["x"])


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_mixture_has_the_moments_of_its_closed_form(dimension):
    source = generated.Mixture(
        dimension=dimension, num_components=4, std=0.3, radius=2.0, size=40_000
    )
    np.testing.assert_allclose(np.linalg.norm(source.means, axis=1), 2)
    np.testing.assert_allclose(source.weights, 0.25)
    batch = rows(source, len(source))
    for label in range(4):
        x = batch["x"][batch["label"] == label]
        assert len(x) / len(source) == pytest.approx(0.25, abs=0.02)
        np.testing.assert_allclose(x.mean(0), source.means[label], atol=0.02)
        np.testing.assert_allclose(
            np.cov(x.T), 0.09 * np.eye(dimension).squeeze(), atol=0.005
        )


def test_mixture_means_lie_evenly_on_a_circle_in_two_dimensions():
    means = generated.Mixture(num_components=4, radius=3.0).means
    np.testing.assert_allclose(means, [[3, 0], [0, 3], [-3, 0], [0, -3]], atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (6, 2), (8, 8, 3), (4, 6, 6, 1)])
def test_generated_has_any_shape_and_is_smooth(shape):
    source = generated.Generated(shape=shape, num_classes=0, size=20)
    batch = rows(source, 20)
    assert batch.keys() == {"x"} and source.spec.num_classes == 0
    assert batch["x"].shape == (20, *shape) and np.abs(batch["x"]).max() <= 1
    if shape == (8, 8, 3):
        assert np.abs(np.diff(batch["x"], axis=2)).mean() < 0.5 * batch["x"].std()


def test_generated_classes_differ_more_than_their_examples():
    source = generated.Generated(shape=(8, 8, 3), num_classes=2, size=40)
    x = rows(source, 40)["x"]
    assert x[::2].std(0).mean() < np.abs(x[::2].mean(0) - x[1::2].mean(0)).mean()


def test_wrong_options_are_refused():
    for change in ({"std": 0.0}, {"num_components": 0}, {"size": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            generated.Mixture(**change)
    for change in ({"shape": ()}, {"shape": (2, 0)}, {"shape": (2,), "size": 0}):
        with pytest.raises(ValueError, match="shape|size"):
            generated.Generated(**change)
