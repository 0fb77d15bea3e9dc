"""The one program: train, sample, evaluate, inspect.

  diffusionlab --config=configs/digits/denoising.py --workdir=runs/digits
  diffusionlab --mode=sample --workdir=runs/digits --num_samples=64 --label=3
  diffusionlab --mode=eval --samples=mine.npz --reference=digits

Flags are read and configs checked before JAX is imported: a mistake is answered at
once, and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from diffusionlab import config as config_lib
from diffusionlab import explain, inherit, registry, settings, workdir

MODES = {
    "train": "train, or go on with a run (default)",
    "sample": "draw samples from a run",
    "eval": "evaluate a checkpoint of a run, or follow it; or --samples of any program",
    "import": "make a run of --weights from elsewhere, to be sampled or distilled",
    "config": "print the resolved config, parameters, FLOPs and memory; compiles only",
    "doctor": "print what this machine is and how fast",
}

_EVALS = {"quality": {"name": "sample_quality", "extractor": {"name": "inception"}}}


def parser() -> argparse.ArgumentParser:
    """Returns the flags of the program."""
    modes = "\n".join(f"  {name:<8} {text}" for name, text in MODES.items())
    p = argparse.ArgumentParser(
        "diffusionlab",
        description=f"{__doc__}\nmodes:\n{modes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE overrides any key: --config.optim.denoiser."
        "learning_rate.value=1e-4. For sample and eval it overrides the run's own "
        "config. With --samples there is no run: of a --config file only the block "
        f"`evals` is used, and without one the evaluators are {_EVALS}.",
    )
    p.add_argument("--mode", choices=MODES, default="train")
    p.add_argument("--config", help="config file, with ':variant' if any")
    p.add_argument("--workdir", type=pathlib.Path, help="the run directory")
    p.add_argument(
        "--resume",
        choices=("auto", "never", "newest_whole"),
        default="auto",
        help="train: go on with a run that is there, refuse to, or go on from the "
        "newest checkpoint that can be read",
    )
    p.add_argument(
        "--step",
        type=_step,
        help="sample, eval: a checkpoint by its step, by default the newest; 'best' is "
        "the one that config.checkpoint.best keeps",
    )
    p.add_argument(
        "--ema", help="sample, eval: average by name, 'none', or sigma_rel=WIDTH"
    )
    p.add_argument("--num_samples", type=int, default=64, help="sample: how many")
    p.add_argument("--label", type=int, help="sample: class (all in turn)")
    p.add_argument("--seed", type=int, default=0, help="sample: seed of the samples")
    p.add_argument("--batch_size", type=int, default=64, help="sample: size of a part")
    p.add_argument("--prompt", help="sample: text that every sample begins with")
    p.add_argument("--infill", type=pathlib.Path, help="sample: a text to fill in")
    p.add_argument("--blank", default="_", help="sample: gap in --infill (_)")
    p.add_argument("--part", default="0/1", help="sample: K/N, of N processes")
    p.add_argument(
        "--out",
        type=pathlib.Path,
        help="sample: folder for the samples; eval --samples: for the results "
        "(<samples>_evaluation)",
    )
    p.add_argument("--follow", action="store_true", help="eval: each new checkpoint")
    p.add_argument(
        "--samples",
        help="eval: samples in an .npz or .npy file ('x' or 'arr_0', [N, H, W, C], "
        "uint8 or in [-1, 1]) or a folder of images; no run is needed",
    )
    p.add_argument(
        "--reference",
        help="eval: what --samples are compared with: such a file or folder, an .npz "
        "file with 'mu' and 'sigma', the name of a data set or its block, as "
        "\"{'name': 'digits', 'split': 'test'}\"",
    )
    p.add_argument(
        "--weights",
        help="import: the file, .safetensors, .npz, .pth, .pt or .bin, for the network "
        "of --config",
    )
    p.add_argument(
        "--plugins", type=pathlib.Path, help="folder with modules for 'module:object'"
    )
    p.add_argument(
        "--compilation_cache",
        default=os.environ.get("JAX_COMPILATION_CACHE_DIR")
        or str(pathlib.Path.home() / ".cache" / "diffusionlab" / "jax"),
        help="folder of compiled programs; 'off' for none (%(default)s)",
    )
    p.add_argument(
        "--cache",
        type=pathlib.Path,
        help="folder of statistics of references and converted weights "
        "(DIFFUSIONLAB_CACHE of the environment, or ~/.cache/diffusionlab)",
    )
    p.add_argument(
        "--virtual_devices",
        type=int,
        default=0,
        help="this many devices of a CPU, to try a mesh without the machine",
    )
    p.add_argument("--coordinator", help="several processes: host:port, or 'auto'")
    p.add_argument("--num_processes", type=int, default=1)
    p.add_argument("--process_id", type=int, default=0)
    p.add_argument("--join_timeout", type=int, default=300, help="seconds")
    return p


def _step(text: str) -> int | str:
    """A step, or 'best'."""
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step or 'best', got '{text}'")
    return text if text == "best" else int(text)


def _overrides(unknown: list[str], flags: argparse.ArgumentParser) -> list[str]:
    """Returns 'key=value' of each --config.key=value.

    Raises:
      ValueError: another flag; names the nearest.
    """
    found = []
    known = [o for action in flags._actions for o in action.option_strings]
    for word in unknown:
        if not word.startswith("--config."):
            name = word.partition("=")[0]
            raise ValueError(f"{word}: unknown flag{registry.nearest(name, known)}")
        found.append(word.removeprefix("--config."))
    return found


def _load(args: argparse.Namespace, overrides: list[str]) -> dict:
    """Returns the resolved config: of the file, or of the run."""
    needs_config = args.mode in ("train", "import") or (
        args.mode == "config" and not args.workdir
    )
    if args.mode != "config" and args.workdir is None:
        raise ValueError(f"--workdir: missing; mode {args.mode} needs a run directory.")
    if args.config is None:
        has_run = args.workdir and (args.workdir / "config.json").is_file()
        if needs_config and not has_run:
            raise ValueError(
                "--config: missing; for example --config=configs/digits/denoising.py."
            )
        import ml_collections

        config = ml_collections.ConfigDict(workdir.read_config(args.workdir))
    else:
        config = config_lib.load(args.config)
    if args.config is None:
        config_lib.override(config, overrides)
    else:
        inherit.override(config, overrides, args.workdir)
    resolved = config_lib.resolve(config)
    if args.mode in ("sample", "eval"):
        stored = workdir.read_config(args.workdir)
        if found := config_lib.conflicts(stored, resolved):
            raise workdir.WorkdirError(
                f"--config: '{args.workdir}' is a run of another config; leave it out, "
                "the run knows its own: " + "; ".join(found)
            )
    return resolved


def _load_evals(args: argparse.Namespace, overrides: list[str]) -> dict:
    """Returns the blocks of the evaluators of --samples, as they are given.

    Raises:
      ValueError: a flag is missing, or one of a run is there.
      FileNotFoundError: there is no such config file.
    """
    if args.reference is None:
        raise ValueError(
            "--reference: missing; what are the samples compared with? For example "
            "--reference=data.npz, or the name of a data set."
        )
    for flag in ("workdir", "step", "ema", "follow"):
        if getattr(args, flag) not in (None, False):
            raise ValueError(f"--{flag}: is of a run, and --samples need none.")
    import ml_collections

    config = ml_collections.ConfigDict({"evals": _EVALS})
    if args.config is not None:
        config.evals = config_lib.load(args.config).get("evals", {})
        if not config.evals:
            raise ValueError(f"--config: '{args.config}' has no evaluators (`evals`).")
    config_lib.override(config, overrides)
    blocks = config.to_dict()
    for name in set(blocks) - {"evals"}:
        raise ValueError(f"config.{name}: with --samples only config.evals is used.")
    config_lib.check_evals(blocks["evals"])
    if not blocks["evals"]:
        raise ValueError("config.evals: empty, and --samples need an evaluator.")
    return blocks["evals"]


def _part(text: str) -> tuple[int, int]:
    which, _, of = text.partition("/")
    if not (which.isdigit() and of.isdigit()):
        raise ValueError(f"--part: expected K/N, for example 0/2, got '{text}'.")
    return int(which), int(of)


def run(argv: list[str]) -> int:
    """Runs the program; returns its exit status.

    Raises:
      ValueError, TypeError, FileNotFoundError, RuntimeError: what the user gave cannot
        be used; the message says why.
    """
    flags = parser()
    args, unknown = flags.parse_known_args(argv)
    overrides = _overrides(unknown, flags)
    if args.plugins:
        registry.plug_in_path(str(args.plugins.resolve()))
    part = _part(args.part)
    config = None
    if args.cache:
        os.environ["DIFFUSIONLAB_CACHE"] = str(args.cache.resolve())
    files = args.samples is not None or args.reference is not None
    if files and (args.mode != "eval" or args.samples is None):
        flag = "reference" if args.samples is None else "samples"
        raise ValueError(f"--{flag}: goes with --mode=eval and --samples=PATH.")
    if files:
        config = _load_evals(args, overrides)
    elif args.mode != "doctor":
        config = _load(args, overrides)
        if args.mode == "train":
            workdir.check(args.workdir, config, args.resume)
        if args.mode in ("sample", "eval") and args.step == "best":
            args.step = workdir.best_step(args.workdir)
    if (args.weights is None) == (args.mode == "import"):
        raise ValueError(
            "--weights: missing; mode import needs a file of weights."
            if args.weights is None
            else "--weights: goes with --mode=import."
        )
    cache = _set_up_jax(args)
    if args.mode == "doctor":
        from diffusionlab import describe

        print(describe.doctor(args.workdir or pathlib.Path(), cache))
        return 0
    if args.mode == "config":
        from diffusionlab import describe

        print(config_lib.to_text(config), flush=True)
        print(describe.describe(config))
        return 0
    if args.mode == "train":
        from diffusionlab import train

        asked = {"config": args.config, "overrides": overrides}
        return train.train(config, args.workdir, resume=args.resume, asked=asked)
    if args.mode == "import":
        from diffusionlab import import_weights

        asked = {"config": args.config, "overrides": overrides}
        out = import_weights.import_weights(config, args.workdir, args.weights, asked)
        print(f"a run in {out}")
        return 0
    if files:
        from diffusionlab import evaluate_files

        out = evaluate_files.run(
            samples=args.samples, reference=args.reference, evals=config, out=args.out
        )
        print(f"results in {out}")
        return 0
    _use(args, config, part)
    return 0


def _use(args: argparse.Namespace, config: dict, part: tuple[int, int]) -> None:
    """Modes sample and eval."""
    import jax

    from diffusionlab import evaluate, experiment, infilling, restore, sample, sharding

    given = infilling.read(args.prompt, args.infill, args.blank, args.mode)
    if not sharding.fits(settings.Mesh(**config["mesh"])):
        print(f"config.mesh {config['mesh']} is for another machine: data=-1 here")
        config["mesh"] |= {"data": -1, "fsdp": 1, "tensor": 1}
    built = experiment.build(config)
    mesh = sharding.make_mesh(built.mesh)
    ema = args.ema or restore.default_ema(built)
    with jax.set_mesh(mesh):
        if args.mode == "eval":
            evaluate.evaluate(
                built, mesh, args.workdir, step=args.step, ema=ema, follow=args.follow
            )
            return
        out = sample.sample(
            built,
            mesh,
            args.workdir,
            num_samples=args.num_samples,
            label=args.label,
            given=given,
            seed=args.seed,
            step=args.step,
            ema=ema,
            batch_size=args.batch_size,
            part=part,
            out=args.out,
        )
    print(f"samples in {out}")


def _set_up_jax(args: argparse.Namespace) -> str:
    """Compilation cache and processes; returns where the cache is, or 'off'."""
    if args.virtual_devices:
        flag = settings.VIRTUAL_DEVICES.format(args.virtual_devices)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    # Keep even what compiles in no time: a second start then compiles nothing.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if args.compilation_cache != "off":
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache)
    else:
        jax.config.update("jax_enable_compilation_cache", False)
    if args.coordinator:
        from diffusionlab import multihost

        multihost.initialize(
            args.coordinator, args.num_processes, args.process_id, args.join_timeout
        )
    return args.compilation_cache


def main() -> None:
    """Entry point: an error of the user's is one line, one of ours a traceback."""
    try:
        status = run(sys.argv[1:])
    except Exception as error:
        if not (said := explain.explain(error)):
            raise
        print(f"diffusionlab: error: {said}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status)


if __name__ == "__main__":
    # As a module of the package, not as "__main__": errors are then known as ours.
    from diffusionlab.main import main as program

    program()
