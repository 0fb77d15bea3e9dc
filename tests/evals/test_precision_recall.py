import numpy as np
import pytest

from diffusionlab.evals import precision_recall as pr


def test_knn_radii_by_hand():
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert pr.knn_radii(x, 1).tolist() == [1, 1, 2, 4]
    assert pr.knn_radii(x, 2).tolist() == [3, 2, 3, 6]


def test_radii_of_repeated_points_are_zero():
    assert pr.knn_radii(np.ones((3, 2)), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_have_that_many_neighbours(k):
    with pytest.raises(ValueError, match="k: expected 1 to 3"):
        pr.knn_radii(np.zeros((4, 1)), k)


def test_precision_and_recall_by_hand():
    # Balls, k = 1: real 0.1±0.9, 1±0.9, 3±2, 7±4; fake 0.5±0.5, 1±0.5, 20±19.
    real = np.array([[0.1], [1.0], [3.0], [7.0]])
    fake = np.array([[0.5], [1.0], [20.0]])
    precision, recall = pr.precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3), "20 lies in no ball of the real points"
    assert recall == 1, "the ball of the outlier at 20 reaches down to 3"
    precision, recall = pr.precision_recall(real, fake[:2], k=1)
    assert (precision, recall) == (1, 0.5)


def test_a_copied_mode_is_precise_and_recalls_little():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2)) + np.repeat([[0, 0], [30, 0]], 100, axis=0)
    precision, recall = pr.precision_recall(real, real[:100] + 0.01)
    assert precision > 0.95
    assert 0.4 < recall < 0.52


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(50, 3, 2)), rng.normal(size=(70, 3, 2))
    whole = pr.precision_recall(real, fake), pr.nearest(pr.flat(fake), pr.flat(real))[0]
    monkeypatch.setattr(pr, "_CHUNK", 170)
    parts = pr.precision_recall(real, fake), pr.nearest(pr.flat(fake), pr.flat(real))[0]
    assert whole[0] == parts[0]
    assert np.array_equal(whole[1], parts[1])


def test_a_copy_is_at_distance_exactly_zero():
    x = np.random.default_rng(2).normal(100, 1, size=(40, 64)).astype(np.float32)
    index, distance = pr.nearest(x[::-1], x)
    assert index.tolist() == list(range(40))[::-1]
    assert distance.max() == 0
