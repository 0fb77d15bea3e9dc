"""Runs and sweeps on a laptop, a Slurm cluster, GKE or TPUs, with the same words.

python -m launch run --config=configs/mixture/denoising.py:smoke --workdir=runs/a
python -m launch sweep --config=configs/mixture/denoising.py --sweep=rate --name=s1
python -m launch resume runs/s1
python -m launch status runs/s1
python -m launch table runs/s1 --metric=eval/mixture/excess --out=table.csv
python -m launch cancel runs/s1
"""

from __future__ import annotations

import sys

from launch import commands

if __name__ == "__main__":
    sys.exit(commands.main(sys.argv[1:]))
