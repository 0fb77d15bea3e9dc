import numpy as np
import pytest

from diffusionlab.metrics import base, moments

X = np.random.default_rng(0).normal(3, 2, size=(101, 7))


def assert_same(found, rows):
    assert found.num == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=0, atol=1e-12)
    covariance = np.cov(rows, rowvar=False)
    np.testing.assert_allclose(found.covariance, covariance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [(), (1,), (50,), (3, 4, 99), tuple(range(1, 101))])
def test_any_division_has_the_moments_of_all(cuts):
    parts = np.split(X, cuts)
    assert_same(moments.merge(moments.of_rows(part) for part in parts), X)


def test_pieces_change_nothing(monkeypatch):
    monkeypatch.setattr(moments, "_ROWS", 9)
    assert_same(moments.of_rows(X), X)


def test_a_large_mean_loses_nothing():
    shifted = moments.merge(map(moments.of_rows, np.split(X + 1e6, [30])))
    # A mean of 1e6 has an error of 1e-10, and a sum of squares would have one of 1e-4.
    np.testing.assert_allclose(shifted.covariance, np.cov(X.T), rtol=0, atol=1e-8)


def test_without_is_the_inverse_of_merge():
    total = moments.of_rows(X)
    assert_same(moments.without(total, moments.of_rows(X[40:])), X[:40])
    with pytest.raises(ValueError, match="101 of 101 rows leave none"):
        moments.without(total, total)


def test_single_rows_have_no_covariance():
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        moments.of_rows(X[:1]).covariance  # noqa: B018
    with pytest.raises(ValueError, match="there are no moments"):
        moments.merge([])


def test_jackknife_of_a_mean_is_its_standard_error():
    x = X[:, 0]
    low, high = base.jackknife(x.mean(), (x.sum() - x) / (len(x) - 1))
    # t of 100 degrees of freedom.
    half = 1.98397 * x.std(ddof=1) / len(x) ** 0.5
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-5)
    mean, (low, high) = base.of_mean(x)
    half *= 1.96 / 1.98397
    assert (mean, low, high) == pytest.approx((x.mean(), mean - half, mean + half))


def test_shares_have_wilson_intervals():
    # Both ends solve (p - share)² = 1.96² p (1 - p) / n.
    share, ends = base.of_share(3, 20)
    assert share == 0.15
    for p in ends:
        assert (p - share) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 20)
    assert base.of_share(0, 20)[1] == pytest.approx((0, 1.96**2 / (20 + 1.96**2)))
    assert base.of_share(20, 20)[1][1] == 1


def test_some_rows_are_read_in_pieces(monkeypatch):
    rows = np.random.default_rng(7).normal(size=(40, 3))
    index = np.array([1, 5, 6, 17, 30, 31, 39])
    monkeypatch.setattr(moments, "_ROWS", 3)
    assert [len(piece) for piece in moments.pieces(rows, index)] == [3, 3, 1]
    found = moments.of_rows(rows, index)
    assert found.num == 7
    np.testing.assert_allclose(found.covariance, np.cov(rows[index], rowvar=False))
