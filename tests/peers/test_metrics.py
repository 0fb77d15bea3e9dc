"""Our statistics against those of the packages that papers use, on equal features."""

import pathlib
import sys

import numpy as np
import pytest

from diffusionlab.metrics import (
    frechet,
    inception_score,
    kernel,
    memorization,
    moments,
    neighbours,
    psnr,
    ssim,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "metrics"))
import feature_sets

torch = pytest.importorskip("torch")
A, B, LOGITS = feature_sets.golden()


def distance(a, b):
    return frechet.frechet_distance(moments.of_rows(a), moments.of_rows(b))


def statistics(rows):
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


@pytest.mark.parametrize("d", [32, 200])
def test_frechet_of_torch_fidelity_and_clean_fid(d):
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    fid = pytest.importorskip("cleanfid.fid")
    rng = np.random.default_rng(d)
    a, b = rng.normal(size=(2, 900, d)) * np.linspace(0.5, 2, d)
    ours = distance(a, b + 0.1)
    a, b = statistics(a), statistics(b + 0.1)
    theirs = metric_fid.fid_statistics_to_metric(a, b, False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-10)
    theirs = fid.frechet_distance(*a.values(), *b.values())
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_inception_score_of_torch_fidelity():
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = metric_isc.isc_features_to_metric(torch.tensor(LOGITS))
    ours = inception_score.split_scores(LOGITS, 10, 2020)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert (ours.mean(), ours.std()) == pytest.approx(expected, rel=1e-10)


def test_kernel_of_torch_fidelity():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    options = dict(kid_subsets=20, kid_subset_size=100, verbose=False)
    theirs = metric_kid.kid_features_to_metric(
        torch.tensor(A), torch.tensor(B), rng_seed=2020, **options
    )
    ours = kernel.kernel_subsets(A, B, 20, 100, 2020).values
    expected = [theirs[f"kernel_inception_distance_{s}"] for s in ("mean", "std")]
    assert [ours.mean(), ours.std()] == pytest.approx(expected, rel=1e-10)


def test_precision_and_recall_of_torch_fidelity():
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = metric_prc.prc_features_to_metric(
        torch.tensor(B), torch.tensor(A), prc_neighborhood=3, verbose=False
    )
    found = neighbours.prdc(A, B, 3, strict=False)
    expected = theirs["precision"], theirs["recall"]
    # torch takes the mean of these in float32.
    assert (found.precision, found.recall) == pytest.approx(expected, rel=1e-6)


def test_mifid_of_torchmetrics_is_ours_with_the_sets_exchanged():
    mifid = pytest.importorskip("torchmetrics.image.mifid")
    rng = np.random.default_rng(0)
    reals = np.abs(rng.normal(size=(80, 6)))
    fakes = reals[:50] + 0.05 * rng.normal(size=(50, 6)) + 0.1
    fid = distance(fakes, reals)
    parts = []
    for rows in (reals, fakes):
        part = statistics(rows)
        parts += [torch.tensor(part["mu"]), torch.tensor(part["sigma"])]
        parts.append(torch.tensor(rows))
    theirs = float(mifid._mifid_compute(*parts))
    by_reals = memorization.cosine_distances(reals, fakes)
    by_fakes = memorization.cosine_distances(fakes, reals)
    assert by_reals.mean() < 0.1 and by_fakes.mean() < 0.1
    assert memorization.mifid(fid, by_reals) == pytest.approx(theirs, rel=1e-8)
    # The definition: for each sample the nearest example.
    assert memorization.mifid(fid, by_fakes) != pytest.approx(theirs, rel=0.05)


def pairs():
    x, y = np.random.default_rng(1).uniform(-1, 1, (2, 3, 24, 20, 3)).astype(np.float32)
    return x, (0.6 * x + 0.4 * y).astype(np.float32)


def channels_first(x):
    return torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2)


def test_pairs_of_scikit_image():
    measure = pytest.importorskip("skimage.metrics")
    x, y = (q.astype(np.float64) for q in pairs())
    theirs = [
        measure.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2,
            channel_axis=-1,
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert ssim.ssim(x, y) == pytest.approx(theirs, rel=1e-10)
    theirs = [
        measure.peak_signal_noise_ratio(a, b, data_range=2)
        for a, b in zip(x, y, strict=True)
    ]
    assert psnr.psnr(x, y) == pytest.approx(theirs, rel=1e-10)


def test_pairs_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    x, y = pairs()
    mean, places = functional.structural_similarity_index_measure(
        channels_first(x),
        channels_first(y),
        data_range=2.0,
        reduction="none",
        return_full_image=True,
    )
    inner = places[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)).numpy()
    assert ssim.ssim(x, y) == pytest.approx(inner, rel=1e-9)
    # Its mean is over all places, those with a part of the window reflected included.
    assert ssim.ssim(x, y) != pytest.approx(mean.numpy(), rel=1e-2)
    theirs = functional.peak_signal_noise_ratio(
        channels_first(x),
        channels_first(y),
        data_range=2.0,
        dim=(1, 2, 3),
        reduction="none",
    )
    assert psnr.psnr(x, y) == pytest.approx(theirs.numpy(), rel=1e-6)
