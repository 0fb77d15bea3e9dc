"""The time of a sweep against that of as many single runs, each with an empty cache.

  python benchmarks/sweep.py --folder=runs/sweep_benchmark

Twelve trials of configs/mixture/denoising.py, two at a time, on a cache of compiled
programs that starts empty and that they share; then single runs, one after the other,
each with an empty cache, of which `--cold` are run and the mean is taken twelve times.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time

from launch import definition

CONFIG = "configs/mixture/denoising.py"
SWEEPS = ("rate", "width")


def run(*words: str, cache: pathlib.Path) -> float:
    """Returns the seconds that a program takes.

    Args:
      words: after python.
      cache: folder of compiled programs.

    Raises:
      subprocess.CalledProcessError: it fails.
    """
    cache.mkdir(parents=True)
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    since = time.perf_counter()
    subprocess.run([sys.executable, *words], env=env, check=True, stdout=sys.stderr)
    return time.perf_counter() - since


def main() -> None:
    """Prints both times and their ratio."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--folder", type=pathlib.Path, required=True)
    flags.add_argument("--cold", type=int, default=12, help="single runs (%(default)s)")
    flags.add_argument("--max_parallel", type=int, default=2)
    args = flags.parse_args()
    points, _ = definition.choose(CONFIG, SWEEPS)
    together = run(
        *("-m", "launch", "sweep", f"--config={CONFIG}", f"--sweep={','.join(SWEEPS)}"),
        *(f"--root={args.folder}", "--name=sweep", "--metric=eval/mixture/excess"),
        f"--max_parallel={args.max_parallel}",
        cache=args.folder / "shared",
    )
    # Spread over the grid: the widest network takes longest.
    chosen = [points[i * len(points) // args.cold] for i in range(args.cold)]
    alone = [
        run(
            *("-m", "diffusionlab.main", f"--config={CONFIG}"),
            f"--workdir={args.folder / f'single_{i}'}",
            *(f"--{definition.word(key, value)}" for key, value in point.items()),
            cache=args.folder / f"cold_{i}",
        )
        for i, point in enumerate(chosen)
    ]
    singles = sum(alone) / len(alone) * len(points)
    print(f"sweep of {len(points)}: {together:.0f} s")
    print(f"{len(points)} cold single runs: {singles:.0f} s (of {len(alone)} measured)")
    print(f"ratio {together / singles:.2f}")


if __name__ == "__main__":
    main()
