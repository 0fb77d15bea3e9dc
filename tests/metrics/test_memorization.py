import feature_sets
import numpy as np
import pytest

from diffusionlab.metrics import frechet, memorization, moments
from diffusionlab.metrics.memorization import Memorization


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def measured(x, y, **options):
    samples = feature_sets.Arrays(features=x)
    return Memorization(**options)(samples, feature_sets.reference(y))


def test_cosine_distances_by_hand():
    found = memorization.cosine_distances(
        np.array([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]]), np.array([[5.0, 0.0]])
    )
    assert found == pytest.approx([0, 1 - 0.5**0.5, 1], abs=1e-15)


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(20, 4), normal(33, 4, seed=1)
    whole = memorization.cosine_distances(x, y)
    exact = 1 - np.abs(
        (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    ).max(axis=1)
    np.testing.assert_allclose(whole, exact, atol=1e-14)
    monkeypatch.setattr(memorization, "_CHUNK", 50)
    np.testing.assert_allclose(memorization.cosine_distances(x, y), exact, atol=1e-14)


def test_mifid_divides_by_the_mean_below_the_threshold():
    assert memorization.mifid(3.0, np.array([0.02, 0.06])) == pytest.approx(75)
    assert memorization.mifid(3.0, np.array([0.1, 0.1])) == 3
    assert memorization.mifid(3.0, np.array([0.02, 0.06]), 0.01) == 3
    assert memorization.mifid(1e-9, np.zeros(2)) == 0, "equal sets"
    assert memorization.mifid(3.0, np.zeros(2)) == float("inf")


def test_the_data_themselves_are_found_out():
    x = normal(60, 4)
    numbers = measured(x, x).numbers
    assert numbers["mifid"] == numbers["nearest_distance"] == 0
    assert numbers["authenticity"] == 0
    assert numbers["too_close"] == 1
    assert numbers["nearest_distance_reference"] > 0.1


def test_fresh_data_are_not():
    x, y = normal(400, 4), normal(500, 4, seed=1)
    found = measured(x, y)
    assert found.numbers["nearest_distance_ratio"] == pytest.approx(1, abs=0.1)
    assert found.intervals["too_close"][0] < 0.01 < found.intervals["too_close"][1]
    # A fresh point is as likely to be nearer to its neighbour as that one's neighbour.
    assert 0.4 < found.numbers["authenticity"] < 0.65


def test_authenticity_by_hand():
    # Nearest: 0.4 -> 0 (1 from its neighbour), 2.8 -> 3 (2), 9 -> 3.
    y = np.array([[0.0], [1.0], [3.0]])
    found = memorization.nearest(np.array([[0.4], [2.8], [9.0]]), y)
    assert found.index.tolist() == [0, 2, 2]
    assert found.distance == pytest.approx([0.4, 0.2, 6])
    assert found.among.tolist() == [1, 1, 2]
    assert memorization.authentic(found).tolist() == [False, False, True]
    twice = memorization.nearest(y[:1], np.concatenate([y, y]))
    assert not memorization.authentic(twice).any(), "a copy of what is there twice"


def test_numbers_have_intervals_and_notes():
    a, b, _ = feature_sets.golden()
    found = measured(b, a)
    exact = frechet.frechet_distance(moments.of_rows(a), moments.of_rows(b))
    assert found.numbers["mifid"] == pytest.approx(exact)
    assert "at or above 0.1" in found.notes["mifid"]
    for name, (low, high) in found.intervals.items():
        assert low <= found.numbers[name] <= high
    near = measured(a[:250] + 1e-3 * b, a)
    distance = near.numbers["mifid_distance"]
    assert distance < 1e-4
    assert near.numbers["mifid"] > 1e4 * 1e-9
    assert "mean cosine distance" in near.notes["mifid"]


def images(num, size=4, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, size=(num, size, size, 1))


def test_the_picture_has_the_closest_pairs_first():
    x, y = normal(6, 3), normal(9, 3, seed=1)
    x[4] = y[7]
    samples = feature_sets.Arrays(features=x, images=images(6))
    reference = feature_sets.reference(y, images=images(9, seed=1))
    asked = []
    look = reference.examples
    reference.examples = lambda indices: asked.extend(indices) or look(indices)
    found = Memorization(num_pairs=3)(samples, reference)
    assert asked[0] == 7 and len(asked) == 3
    picture = found.pictures["nearest"]
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3
    assert not Memorization(num_pairs=0)(samples, reference).pictures
    samples.images = None
    assert not Memorization()(samples, reference).pictures
    samples.images = np.zeros((6, 2))
    reference.images = np.zeros((9, 2))
    assert not Memorization()(samples, reference).pictures, "points are no images"


def test_what_cannot_be_is_said():
    a, b, _ = feature_sets.golden()
    with pytest.raises(ValueError, match="the reference: only moments"):
        Memorization()(
            feature_sets.Arrays(features=b),
            feature_sets.reference(a, only_moments=True),
        )
    with pytest.raises(ValueError, match="threshold: must be above 0"):
        Memorization(threshold=0.0)
    with pytest.raises(ValueError, match="num_pairs: must not be negative"):
        Memorization(num_pairs=-1)
    with pytest.raises(ValueError, match="points of the reference"):
        measured(b, a[:1])
