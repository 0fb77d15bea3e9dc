"""Throughput of the training loop against a bare jitted step, as a ratio.

Both do the same update with the same network, optimiser and averages. The bare step
has its batch on the device already; the loop reads its own, logs and gathers metrics.
Stretches of both alternate in one process; the figure is the ratio of their medians.

  python benchmarks/train_loop.py [--config=configs/digits/denoising.py] [--steps=50]
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time

import jax
import optax

from diffusionlab import compiled, ema, experiment, sharding, state, train, train_step
from diffusionlab import config as config_lib


def bare_step(built):
    """The same update, written down without the machinery: no metrics, no guard."""
    gradients = train_step.make_gradients(built, "train")
    optimizers = state.optimizers(built)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(old, batch):
        grads, _ = gradients(old, batch)
        params, opt_state = {}, {}
        for role, grad in grads.items():
            updates, opt_state[role] = optimizers[role].update(
                grad, old.opt_state[role], old.params[role]
            )
            params[role] = optax.apply_updates(old.params[role], updates)
        finished = old.step + 1
        averages = {
            name: {
                role: ema.update(tree, params[role], built.ema[name].rate(finished))
                for role, tree in by_role.items()
            }
            for name, by_role in old.ema.items()
        }
        return state.TrainState(finished, params, opt_state, averages)

    return step


def time_of_logging(loop, step: int) -> float:
    """Median seconds of a log point when there is nothing left to compute."""
    found = []
    for _ in range(9):
        jax.block_until_ready((loop.state, loop.gathered))
        start = time.perf_counter()
        loop._log(step)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--config", default="configs/digits/denoising.py")
    flags.add_argument("--steps", type=int, default=50, help="of one stretch")
    flags.add_argument("--rounds", type=int, default=7)
    args = flags.parse_args()
    config = config_lib.load(args.config)
    config_lib.override(
        config,
        [
            f"train.num_steps={args.steps * args.rounds + 1}",
            f"checkpoint.every={10**9}",
            "logging.samples_every=0",
            f"logging.every={args.steps}",
        ],
    )
    built = experiment.build(config_lib.resolve(config))
    mesh = sharding.make_mesh(built.mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        steps, data = (
            compiled.Steps(built, mesh),
            train.make_batches(built, mesh, built.train_source),
        )
        loop = train.Loop(built, mesh, pathlib.Path(folder), "auto", steps, data)
        loop.clock = loop._clock(built.train.num_steps)
        step = bare_step(built)
        bare = state.init(built, mesh)
        batch = loop._global(next(loop.data))
        bare = jax.block_until_ready(step(bare, batch))
        loop.advance(0, 1)
        done = 1
        ours, theirs = [], []
        for _ in range(args.rounds):
            start = time.perf_counter()
            for _ in range(args.steps):
                bare = step(bare, batch)
            jax.block_until_ready(bare)
            theirs.append(time.perf_counter() - start)
            start = time.perf_counter()
            loop.advance(done, done + args.steps)
            jax.block_until_ready(loop.state)
            ours.append(time.perf_counter() - start)
            done += args.steps
        logged = time_of_logging(loop, done)
        loop.writers.close()
        loop.data.close()
    per_step = statistics.median(ours) / args.steps
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"throughput of the loop / bare step: "
        f"{statistics.median(theirs) / statistics.median(ours):.3f} (rounds from "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f}; "
        f"{1e3 * per_step:.2f} ms per step of ours)"
    )
    print(
        f"a log point takes {1e3 * logged:.2f} ms: "
        f"{logged / args.steps / per_step:.2%} of the time at one every {args.steps} "
        "steps"
    )


if __name__ == "__main__":
    main()
