"""Time of our statistics against the ones in common use, as ratios.

The Frechet distance against `scipy.linalg.sqrtm` of the product of the covariances, and
precision, recall, density and coverage against the package `prdc`. Runs alternate in
one process, and the answers are compared first. On a machine that does other work, set
OPENBLAS_NUM_THREADS=1: threads that wait for each other say nothing about the work.

  python benchmarks/metrics.py [--rounds=3] [--only=frechet,prdc]
"""

import argparse
import contextlib
import io
import statistics
import time

import numpy as np
from scipy import linalg

from diffusionlab.metrics import frechet, moments, neighbours


def alternate(ours, theirs, rounds: int) -> str:
    """'9.1 times (rounds 8.7 to 9.6)': theirs over ours, which take turns."""
    times = [[], []]
    for _ in range(rounds):
        for run, found in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    mine, other = map(statistics.median, times)
    return (
        f"{mine:.3f} s, theirs {other:.3f} s: {other / mine:.1f} times "
        f"(rounds {ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


def of_frechet(d: int, rounds: int) -> None:
    """Prints the ratio for full-rank covariances of `d` features."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 1e-2, d)
    a = moments.of_rows(rng.normal(size=(2 * d, d)) * scale)
    mix = np.eye(d) + 0.3 * rng.normal(size=(d, d)) / d**0.5
    b = moments.of_rows(rng.normal(size=(2 * d, d)) * scale @ mix + 0.01)

    def by_sqrtm():
        first, second = a.covariance, b.covariance
        square = np.sum((a.mean - b.mean) ** 2) + np.trace(first + second)
        return square - 2 * np.trace(linalg.sqrtm(first @ second).real)

    mine, other = frechet.frechet_distance(a, b), by_sqrtm()
    time_ratio = alternate(lambda: frechet.frechet_distance(a, b), by_sqrtm, rounds)
    print(
        f"Frechet distance, d = {d}: {time_ratio}; relative difference "
        f"{abs(mine - other) / other:.0e}",
        flush=True,
    )


def of_prdc(num: int, d: int, dtype, rounds: int) -> None:
    """Prints the ratio for two sets of `num` rows of `d` features."""
    import prdc

    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, num, d)).astype(dtype)

    def theirs():
        with contextlib.redirect_stdout(io.StringIO()):
            return prdc.compute_prdc(real, fake, 5)

    mine = neighbours.prdc(real, fake, 5)
    gap = max(abs(np.array(list(theirs().values())) - np.array(mine)))
    time_ratio = alternate(lambda: neighbours.prdc(real, fake, 5), theirs, rounds)
    print(
        f"PRDC, {num} x {d} {np.dtype(dtype).name}: {time_ratio}; largest "
        f"difference {gap:.0e}",
        flush=True,
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--only", default="frechet,prdc")
    args = flags.parse_args()
    only = args.only.split(",")
    if "frechet" in only:
        for d in (768, 2048):
            of_frechet(d, args.rounds)
    if "prdc" in only:
        for dtype in (np.float32, np.float64):
            of_prdc(3000, 1024, dtype, args.rounds)


if __name__ == "__main__":
    main()
