"""Our statistics against those of other packages on the features of one sample.

Prints a value of ours, of the peer, and their relative difference. Needs
`benchmarks/peers/requirements.txt`.

  python benchmarks/peers/metrics.py [--num=2000] [--features=256]
"""

import argparse
import contextlib
import io

import numpy as np

from diffusionlab.metrics import frechet, inception_score, kernel, moments, neighbours


def show(name: str, ours: float, theirs: float) -> None:
    gap = abs(ours - theirs) / max(abs(theirs), 1e-300)
    print(f"{name:<44} {ours:.12g}  {theirs:.12g}  {gap:.0e}", flush=True)


def of_features(a: np.ndarray, b: np.ndarray) -> None:
    """Prints the distances of samples `a` to a reference `b`, `[N, d]` float64."""
    import prdc
    import torch
    from cleanfid import fid
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    ours = frechet.frechet_distance(moments.of_rows(a), moments.of_rows(b))
    first, second = (
        {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)} for rows in (a, b)
    )
    theirs = metric_fid.fid_statistics_to_metric(first, second, False)
    show("torch-fidelity FID", ours, theirs["frechet_inception_distance"])
    theirs = fid.frechet_distance(*first.values(), *second.values())
    show("clean-fid FID", ours, theirs)
    size = min(1000, len(a), len(b))
    theirs = metric_kid.kid_features_to_metric(
        torch.tensor(a), torch.tensor(b), kid_subset_size=size, verbose=False
    )
    found = kernel.kernel_subsets(a, b, 100, size, 2020).values
    show("torch-fidelity KID", found.mean(), theirs["kernel_inception_distance_mean"])
    show("  its std", found.std(), theirs["kernel_inception_distance_std"])
    theirs = metric_prc.prc_features_to_metric(
        torch.tensor(a), torch.tensor(b), verbose=False
    )
    loose = neighbours.prdc(b, a, 3, strict=False)
    show(
        "torch-fidelity precision (float32 mean)", loose.precision, theirs["precision"]
    )
    show("torch-fidelity recall (float32 mean)", loose.recall, theirs["recall"])
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(b, a, 5)
    for name, value in neighbours.prdc(b, a, 5)._asdict().items():
        show(f"prdc {name}", value, theirs[name])


def of_logits(logits: np.ndarray) -> None:
    """Prints the inception scores of `[N, C]`."""
    import torch
    from torch_fidelity import metric_isc

    theirs = metric_isc.isc_features_to_metric(torch.tensor(logits))
    ours = inception_score.split_scores(logits, 10, 2020)
    show("torch-fidelity IS", ours.mean(), theirs["inception_score_mean"])
    show("  its std", ours.std(), theirs["inception_score_std"])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--num", type=int, default=2000)
    flags.add_argument("--features", type=int, default=256)
    args = flags.parse_args()
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, args.num, args.features))
    of_features(1.05 * a + 0.02, b)
    of_logits(3 * rng.normal(size=(args.num, 100)))


if __name__ == "__main__":
    main()
