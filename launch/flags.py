"""The launcher's flags. Underscores and dashes are the same: --max-parallel."""

from __future__ import annotations

import argparse
import pathlib
import re

from launch.engines import ENGINES, Resources
from launch.sweep import PRUNERS

_EXAMPLES = {
    "run": "--engine=slurm --partition=gpu --nodes=2 --gpus_per_node=8 --time=24h "
    "--config=configs/digits/denoising.py --workdir=runs/digits",
    "sweep": "--config=configs/mixture/denoising.py --sweep=rate,width --seeds=2 "
    "--name=rates --metric=eval/mixture/excess",
    "resume": "runs/rates",
    "status": "runs/rates",
    "table": "runs/rates --metric=eval/mixture/excess --out=table.csv",
    "cancel": "runs/rates",
}
_WHAT = {
    "run": "train one run; the same command again goes on with it",
    "sweep": "train one run for each point of a sweep; again: go on",
    "resume": "go on with a sweep or a run by its directory",
    "status": "one row a trial: state, attempts, preemptions, step, job",
    "table": "one row a trial: overrides and results",
    "cancel": "end the jobs of a sweep or run; they save, and resume goes on",
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser; words it does not know are for `split`."""
    top = argparse.ArgumentParser("python -m launch", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in _WHAT.items():
        p = commands.add_parser(
            name,
            help=what,
            description=f"{what}.",
            epilog=f"example: python -m launch {name} {_EXAMPLES[name]}",
            allow_abbrev=False,
        )
        p.add_argument(
            "--render",
            type=pathlib.Path,
            metavar="FOLDER",
            help="write what would be done into this folder, and do nothing",
        )
        if name in ("run", "sweep"):
            _start(p)
        else:
            p.add_argument("folder", type=pathlib.Path, help="of the sweep or run")
        if name == "run":
            p.add_argument("--workdir", type=pathlib.Path, required=True)
        if name == "sweep":
            _sweep(p)
        if name in ("run", "sweep", "resume"):
            p.add_argument(
                "--detach",
                action="store_true",
                help="submit, and leave the rest to `resume` (run: always, but local)",
            )
            p.add_argument(
                "--poll",
                type=float,
                help="seconds between two looks (local: 0.5, others: 2)",
            )
        if name == "resume":
            p.add_argument("--retry", action="store_true", help="what was given up too")
            p.add_argument(
                "--max_parallel", type=int, help="another number than before"
            )
        if name == "table":
            p.add_argument("--metric", help="another than the sweep's own")
            p.add_argument("--out", type=pathlib.Path, help=".csv or .md")
    return top


def _start(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--config", required=True, help="config file, with ':variant' if any"
    )
    p.add_argument("--engine", choices=ENGINES, default="local")
    p.add_argument("--nodes", type=int, default=1, help="machines; of TPUs slices")
    p.add_argument("--tasks_per_node", type=int, default=1, help="processes")
    p.add_argument("--gpus_per_node", type=int, default=0)
    p.add_argument("--cpus_per_task", type=int, default=0)
    p.add_argument("--memory_gb", type=float, default=0)
    p.add_argument("--time", default="0m", help="limit of an attempt: 90m, 24h, 2d")
    p.add_argument(
        "--max_failures",
        type=int,
        default=2,
        help="failures after which a trial is given up (%(default)s)",
    )


def _sweep(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--sweep",
        default="",
        help="functions sweep_NAME of the config file, multiplied, or one search; "
        "without it the function sweep",
    )
    p.add_argument("--name", required=True, help="of the sweep's directory")
    p.add_argument("--root", type=pathlib.Path, default=pathlib.Path("runs"))
    p.add_argument("--seeds", type=int, default=1, help="repeats of each point")
    p.add_argument("--trials", type=int, help="points of a search")
    p.add_argument("--metric", default="train/loss", help="of metrics.jsonl")
    p.add_argument("--goal", choices=("min", "max"), default="min")
    p.add_argument("--prune", choices=PRUNERS, default="", help="end hopeless trials")
    p.add_argument("--max_parallel", type=int, default=1, help="trials at a time")
    p.add_argument("--extend", action="store_true", help="add points to a sweep")


def minutes(text: str) -> int:
    """Returns the minutes of '90m', '24h' or '2d'.

    Raises:
      ValueError: it is nothing of the kind.
    """
    match = re.fullmatch(r"(\d+)([mhd])", text)
    if match is None:
        raise ValueError(f"--time: expected 90m, 24h or 2d, got '{text}'.")
    return int(match[1]) * {"m": 1, "h": 60, "d": 1440}[match[2]]


def read(argv: list[str]) -> tuple[argparse.Namespace, dict, dict, list[str]]:
    """Returns flags, overrides of the config, options of the engine, and further flags.

    '--config.KEY=VALUE' is an override, another flag that is not the launcher's an
    option of the engine, and what follows '--' is for diffusionlab as it is.

    Raises:
      ValueError: a word is no flag, or has no value.
    """
    further: list[str] = []
    if "--" in argv:
        further = argv[argv.index("--") + 1 :]
        argv = argv[: argv.index("--")]
    args, unknown = parser().parse_known_args([_underscores(word) for word in argv])
    overrides, options = {}, {}
    for word in unknown:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or not equals:
            raise ValueError(f"{word}: expected --NAME=VALUE.")
        if name.startswith("--config."):
            overrides[name.removeprefix("--")] = value
        else:
            options[name.removeprefix("--")] = value
    if args.command not in ("run", "sweep") and unknown:
        raise ValueError(f"{unknown[0]}: no flag of `{args.command}`; see --help.")
    return args, overrides, options, further


def _underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name.startswith("--config."):
        return word
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def resources(args: argparse.Namespace, options: dict[str, str]) -> Resources:
    """Returns what each job gets.

    Raises:
      ValueError: a number is out of range.
    """
    for name in ("max_failures", "max_parallel", "seeds"):
        if getattr(args, name, 1) < 1:
            raise ValueError(
                f"--{name}: must be at least 1, got {getattr(args, name)}."
            )
    return Resources(
        nodes=args.nodes,
        tasks_per_node=args.tasks_per_node,
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        memory_gb=args.memory_gb,
        minutes=minutes(args.time),
        options=options,
    )
