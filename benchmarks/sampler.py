"""Time of the DDIM sampler against a hand-written `lax.scan`, as a ratio.

Same network, parameters, noise and steps; both are jitted, runs alternate in one
process, and the samples are compared first. Then, for each registered sampler, its time
against as many bare forward passes of the network as it evaluates.

  python benchmarks/sampler.py [--config=configs/digits/denoising.py] [--num_steps=64]
  python benchmarks/sampler.py --only=heun,covariance
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from diffusionlab import checks, experiment, inference, keys, registry, sharding, state
from diffusionlab import config as config_lib
from diffusionlab.samplers import base


def by_hand(built, num_steps: int):
    """DDIM for a v-prediction under a cosine schedule, as one would write it down."""
    network = built.networks["denoiser"]
    schedule = built.process.schedule

    def sample(params, z, label):
        def body(z, i):
            t, s = (num_steps - i) / num_steps, (num_steps - i - 1) / num_steps
            logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
            alpha_t, sigma_t = (jax.nn.sigmoid(q * logsnr_t) ** 0.5 for q in (1, -1))
            alpha_s, sigma_s = (jax.nn.sigmoid(q * logsnr_s) ** 0.5 for q in (1, -1))
            every = jnp.full(z.shape[:1], 1.0)
            cond = {"t": t * every, "logsnr": logsnr_t * every, "label": label}
            v = network.apply(params["denoiser"], z, cond)
            x = alpha_t * z - sigma_t * v
            z = alpha_s * x + sigma_s * (sigma_t * z + alpha_t * v)
            return jnp.where(i == num_steps - 1, x, z), None

        return jax.lax.scan(body, z, jnp.arange(num_steps))[0]

    return jax.jit(sample)


def alternate(runs, rounds: int) -> list[list[float]]:
    """Returns the seconds of each of `runs`, which take turns; the first is thrown."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [found[1:] for found in times]


def ratio(mine: list[float], theirs: list[float]) -> str:
    """'1.003 (rounds 0.98 to 1.04)': of the medians, and the span over rounds."""
    rounds = sorted(a / b for a, b in zip(mine, theirs, strict=True))
    total = statistics.median(mine) / statistics.median(theirs)
    return f"{total:.3f} (rounds {rounds[0]:.2f} to {rounds[-1]:.2f})"


def against_scan(built, mesh, params, label, args) -> None:
    """Prints the time of DDIM over that of the scan written by hand."""
    sampler = registry.build(
        "sampler", {"name": "ddim", "num_steps": args.num_steps}, "sampler"
    )
    draw = inference.make_draw(built, mesh, sampler)
    indices = jnp.arange(args.batch_size)
    each = keys.sample_keys(0, indices)
    z = jax.jit(built.process.prior_from, static_argnums=1)(
        base.fold(each, 0), built.spec.shape
    )
    hand = by_hand(built, args.num_steps)
    label_device = jnp.asarray(label)

    def ours():
        return draw(params, 0, indices, label)

    def theirs():
        return jax.device_get(hand(params, z, label_device))

    gap = float(jnp.abs(ours() - theirs()).max())
    mine, by_scan = alternate([ours, theirs], args.rounds)
    print(
        f"DDIM / hand-written scan: {ratio(mine, by_scan)}; "
        f"{statistics.median(mine):.3f} s for {args.batch_size} samples, "
        f"{args.num_steps} steps; samples differ by at most {gap:.1e}"
    )


def bare(built, count: int):
    """`count` forward passes and nothing else; each waits for the one before."""
    network = built.networks["denoiser"]

    def passes(params, z, label):
        def body(z, t):
            # Another time at every pass, or the compiler embeds it once for all.
            every = jnp.broadcast_to(t, z.shape[:1])
            cond = {"t": every, "logsnr": 20.0 * every - 10.0, "label": label}
            return z + 1e-3 * network.apply(params["denoiser"], z, cond), None

        return jax.lax.scan(body, z, jnp.linspace(0.0, 1.0, count))[0]

    return jax.jit(passes)


def against_passes(name, built, mesh, params, label, args) -> None:
    """Prints the time of one sampler over that of its network evaluations alone."""
    block = {"name": name, "num_steps": args.num_steps}
    if name == "euler_maruyama":  # its steps blow up on the uniform grid
        block["grid"] = {"name": "rho"}
    sampler = registry.build("sampler", block, "sampler")
    try:
        checks.check_sampler(sampler, built, name)
    except ValueError as error:
        print(f"{name:<20} refused: {error}")
        return
    count = sampler.num_evaluations
    if count is None:
        print(f"{name:<20} adaptive: as many evaluations as it needs")
        return
    draw = inference.make_draw(built, mesh, sampler)
    indices = jnp.arange(args.batch_size)
    z = jax.random.normal(jax.random.key(0), (args.batch_size, *built.spec.shape))
    passes, label_device = bare(built, count), jnp.asarray(label)
    mine, theirs = alternate(
        [
            lambda: draw(params, 0, indices, label),
            lambda: jax.device_get(passes(params, z, label_device)),
        ],
        args.rounds,
    )
    print(f"{name:<20} {count:>4} evaluations  {ratio(mine, theirs)}", flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--config", default="configs/digits/denoising.py")
    flags.add_argument("--num_steps", type=int, default=64)
    flags.add_argument("--batch_size", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--only", default=",".join(registry.table("sampler")))
    args = flags.parse_args()
    config = config_lib.load(args.config)
    config_lib.override(config, ["guidance={}"])
    built = experiment.build(config_lib.resolve(config))
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        params = state.init(built, mesh).params
        # A network that starts at zero would be no work for a clever compiler.
        params = jax.tree.map(
            lambda p: p + 0.02 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
        )
        label = inference.labels_in_turn(built, jnp.arange(args.batch_size))
        size = sum(p.size for p in jax.tree.leaves(params))
        print(f"network of {size:,} parameters, batch {args.batch_size}")
        against_scan(built, mesh, params, label, args)
        print("time of a sampler / of its network evaluations alone:")
        for name in args.only.split(","):
            against_passes(name, built, mesh, params, label, args)


if __name__ == "__main__":
    main()
