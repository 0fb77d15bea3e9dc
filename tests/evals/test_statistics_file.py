import json

import numpy as np
import pytest

from diffusionlab.evals import statistics_file
from diffusionlab.features.base import Network
from diffusionlab.metrics import moments
from diffusionlab.metrics.frechet import Frechet, frechet_distance

ROWS = np.random.default_rng(0).normal(size=(50, 3)) @ np.diag([1.0, 2.0, 3.0]) + 0.5
MU, SIGMA = ROWS.mean(0), np.cov(ROWS, rowvar=False)


class Set:
    """Features of one output 'features' and one 'spatial'."""

    name, label, class_names = "samples", None, ()

    def __init__(self, rows):
        self._rows, self.num = rows, len(rows)

    def rows(self, output):
        return self._rows if output == "features" else self._rows[:, :2]

    def moments(self, output):
        return moments.of_rows(self.rows(output))


def network(**about):
    return Network({}, None, None, {"network": "tiny", **about})


@pytest.fixture
def write(tmp_path):
    def make(**arrays):
        np.savez(tmp_path / "stats.npz", **arrays)
        return tmp_path / "stats.npz"

    return make


def refused(path, *args):
    with pytest.raises(ValueError) as raised:
        statistics_file.read(path, *args)
    said = str(raised.value)
    assert said.startswith("reference: ") and "\n" not in said and str(path) in said
    return said


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_published_statistics_give_the_distance_of_their_data(write, dtype):
    """A shift by c in three dimensions has the distance 3 c²."""
    path = write(mu=MU.astype(dtype), sigma=SIGMA.astype(dtype))
    found = statistics_file.read(path, network())
    assert found.num == 0 and found.label is None and found.name == str(path)
    assert found.moments("features").covariance.dtype == np.float64
    shifted = Set(ROWS + 2.0)
    # float32 keeps 6e-8 of variances of up to 9.
    tolerance = 1e-8 if dtype is np.float64 else 1e-4
    distance = frechet_distance(shifted.moments("features"), found.moments("features"))
    assert distance == pytest.approx(12.0, abs=tolerance)
    result = Frechet()(shifted, found)
    assert result.numbers["frechet"] == pytest.approx(12.0, abs=tolerance)


def test_statistics_of_adm_have_spatial_features_too(write):
    path = write(mu=MU, sigma=SIGMA, mu_s=MU[:2], sigma_s=2 * SIGMA[:2, :2])
    found = statistics_file.read(path)
    np.testing.assert_array_equal(found.moments("spatial").mean, MU[:2])
    np.testing.assert_array_equal(
        found.moments("spatial").covariance, 2 * SIGMA[:2, :2]
    )
    with pytest.raises(ValueError, match="no statistics of the output 'logits'"):
        found.moments("logits")


def test_what_is_written_is_read_again(tmp_path):
    ours, path = network(), tmp_path / "deep" / "ours.npz"
    about = {"fingerprint": ours.fingerprint, "network": ours.about, "data": "x"}
    statistics_file.write(path, Set(ROWS), about, outputs=("features", "spatial"))
    found = statistics_file.read(path, ours, {"features": 3, "spatial": 2})
    assert found.num == 50 and found.about == about
    exact = Set(ROWS).moments("features")
    np.testing.assert_allclose(found.moments("features").mean, exact.mean, rtol=0)
    np.testing.assert_allclose(
        found.moments("features").scatter, exact.scatter, rtol=1e-14
    )
    assert [p.name for p in path.parent.iterdir()] == ["ours.npz"]
    with np.load(path) as arrays:  # as others read it
        np.testing.assert_allclose(arrays["sigma"], SIGMA, rtol=1e-12)
    # The moments alone decide it.
    statistics_file.write(path, Set(ROWS), {**about, "data": "y"})
    other = statistics_file.read(path).digest
    statistics_file.write(path, Set(ROWS + 1), about)
    digests = {other, found.digest, statistics_file.read(path).digest}
    assert len(digests) == 3


def test_statistics_of_another_network_are_never_used(tmp_path):
    path, theirs = tmp_path / "ours.npz", network(resize="clean")
    about = {"fingerprint": theirs.fingerprint, "network": theirs.about}
    statistics_file.write(path, Set(ROWS), about)
    said = refused(path, network(resize="legacy_tf"))
    assert "another network: resize 'clean' there, 'legacy_tf' here." in said
    statistics_file.read(path, network(resize="clean"))
    assert "has 3 features, and the network 4" in refused(path, None, {"features": 4})


def test_there_are_no_rows_and_no_examples(write):
    found = statistics_file.read(write(mu=MU, sigma=SIGMA))
    for ask in (lambda: found.rows("features"), lambda: found.examples([0])):
        with pytest.raises(ValueError, match=r"reference: .*stats\.npz has statistics"):
            ask()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_unknown_number_of_examples_cannot_be_merged_unnoticed(write):
    found = statistics_file.read(write(mu=MU, sigma=SIGMA)).moments("features")
    merged = moments.merge([found, Set(ROWS).moments("features")])
    assert np.isnan(merged.covariance).all()


NEGATIVE = np.diag([1.0, -2.0, 1.0])
SKEWED = SIGMA + 0.01 * np.eye(3)[[1, 2, 0]]


@pytest.mark.parametrize(
    "arrays, said",
    [
        (dict(mu=MU), "has no 'mu' and 'sigma', so it holds no statistics; it has mu."),
        (dict(x=MU), "it has x."),
        (dict(mu=MU[:2], sigma=SIGMA), "(3, 3), expected mu [d] and sigma [d, d]"),
        (dict(mu=MU[None], sigma=SIGMA), "'mu' of"),
        (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "shape (0,)"),
        (dict(mu=MU * np.nan, sigma=SIGMA), "NaN or infinite"),
        (dict(mu=MU, sigma=SIGMA * [1, np.inf, 1]), "'sigma' of"),
        (dict(mu=MU, sigma=SKEWED), "not symmetric, by up to 0.01."),
        (dict(mu=MU, sigma=NEGATIVE), "the negative variance -2."),
        (dict(mu=MU, sigma=SIGMA.astype(int)), "is int64, expected floats"),
        (dict(mu=MU, sigma=SIGMA, num=1), "'num' of"),
        (dict(mu=MU, sigma=SIGMA, about="[]"), "is no JSON object"),
        (dict(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SKEWED), "'sigma_s' of"),
        (dict(mu=np.array([{}]), sigma=SIGMA), "cannot read"),
    ],
)  # fmt: skip
def test_bad_statistics_are_one_line(write, arrays, said):
    assert said in refused(write(**arrays))


@pytest.mark.parametrize("kept", [0, 40, 300])
def test_truncated_file_is_one_line(write, kept):
    path = write(mu=MU, sigma=SIGMA)
    path.write_bytes(path.read_bytes()[:kept])
    assert "cut short" in refused(path)


def test_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="reference: there is no file"):
        statistics_file.read(tmp_path / "none.npz")
    np.save(tmp_path / "x.npy", MU)
    assert "is no .npz file" in refused(tmp_path / "x.npy")


def test_writing_needs_the_network_and_known_names(tmp_path):
    with pytest.raises(ValueError, match="no 'fingerprint'"):
        statistics_file.write(tmp_path / "x.npz", Set(ROWS), {})
    about = json.loads('{"fingerprint": "0"}')
    with pytest.raises(ValueError, match="accepted: features, spatial"):
        statistics_file.write(tmp_path / "x.npz", Set(ROWS), about, ("logits",))
    assert list(tmp_path.iterdir()) == []
