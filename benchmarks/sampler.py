"""Time of the DDIM sampler against a hand-written `lax.scan`, as a ratio.

Same network, parameters, noise and steps; both are jitted, runs alternate in one
process, and the samples are compared first.

  python benchmarks/sampler.py [--config=configs/digits/denoising.py] [--num_steps=64]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from diffusionlab import config as config_lib
from diffusionlab import experiment, inference, keys, sharding, state
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


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--config", default="configs/digits/denoising.py")
    flags.add_argument("--num_steps", type=int, default=64)
    flags.add_argument("--batch_size", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=9)
    args = flags.parse_args()
    config = config_lib.load(args.config)
    config_lib.override(
        config,
        [f"sampler={{'name': 'ddim', 'num_steps': {args.num_steps}}}", "guidance={}"],
    )
    built = experiment.build(config_lib.resolve(config))
    mesh = sharding.make_mesh(built.mesh)
    with jax.set_mesh(mesh):
        params = state.init(built, mesh).params
        # A network that starts at zero would be no work for a clever compiler.
        params = jax.tree.map(
            lambda p: p + 0.02 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
        )
        indices = jnp.arange(args.batch_size)
        label = inference.labels_in_turn(built, indices)
        draw = inference.make_draw(built, mesh)
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
        times = {ours: [], theirs: []}
        for _ in range(args.rounds):
            for run, found in times.items():
                start = time.perf_counter()
                run()
                found.append(time.perf_counter() - start)
    a, b = (statistics.median(times[run]) for run in (ours, theirs))
    ratios = sorted(x / y for x, y in zip(times[ours], times[theirs], strict=True))
    print(
        f"time of the sampler / hand-written scan: {a / b:.3f} (rounds from "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f}; {a:.3f} s for {args.batch_size} "
        f"samples, {args.num_steps} steps; samples differ by at most {gap:.1e})"
    )


if __name__ == "__main__":
    main()
