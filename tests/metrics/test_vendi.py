import feature_sets
import numpy as np
import pytest

from diffusionlab.metrics import base, vendi
from diffusionlab.metrics.vendi import Vendi


def measured(rows):
    return Vendi()(feature_sets.Arrays(features=rows), None)


@pytest.mark.parametrize("num, width", [(6, 6), (6, 9)])
def test_orthonormal_rows_count_all(num, width):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    assert vendi.vendi(3 * turn[:num]) == pytest.approx(num, abs=1e-9)


def test_identical_rows_count_as_one():
    assert vendi.vendi(np.full((7, 3), 2.0)) == pytest.approx(1, abs=1e-12)


def test_two_groups_of_different_size():
    rows = np.eye(2)[[0, 0, 0, 1]]
    assert vendi.vendi(rows) == pytest.approx(1.7547653506, abs=1e-9)


def test_more_and_fewer_rows_than_features_agree():
    x = np.random.default_rng(1).normal(size=(50, 8))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 50)
    values = values[values > 1e-12]
    exact = np.exp(-np.sum(values * np.log(values)))
    assert vendi.vendi(x) == pytest.approx(exact, rel=1e-10)
    assert measured(x).numbers["vendi"] == pytest.approx(exact, rel=1e-10)


def test_cosines_are_those_of_all_pairs_in_any_blocks(monkeypatch):
    x = np.random.default_rng(4).normal(size=(7, 9))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    monkeypatch.setattr(vendi, "_ENTRIES", 3 * 9)
    np.testing.assert_allclose(vendi._cosines(x), unit @ unit.T, atol=1e-15)


@pytest.mark.parametrize("num, width", [(80, 5), (24, 40)])
def test_intervals_cover(num, width):
    rng, scale = np.random.default_rng(2), np.linspace(0.2, 2, width)
    found = [measured(rng.normal(size=(num, width)) * scale) for _ in range(40)]
    numbers = [each.numbers["vendi"] for each in found]
    ends = np.array([each.intervals["vendi"] for each in found])
    inside = (ends[:, 0] <= np.mean(numbers)) & (np.mean(numbers) <= ends[:, 1])
    # 0.95 less 3 standard deviations of a share of 40.
    assert inside.mean() >= 0.845


@pytest.mark.parametrize("width", [5, 100])
def test_the_jackknife_leaves_groups_out(width):
    x = np.random.default_rng(3).normal(size=(43, width))
    rest = [vendi.vendi(np.delete(x, p, axis=0)) for p in base.groups_of(43, 10)]
    exact = base.jackknife(vendi.vendi(x), rest)
    assert measured(x).intervals["vendi"] == pytest.approx(exact, rel=1e-9)


def test_rows_without_direction_are_refused():
    with pytest.raises(ValueError, match="samples: 2 of 3 rows of 'features' are zero"):
        measured(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    assert measured(np.eye(3)).intervals == {}, "too few for groups"
