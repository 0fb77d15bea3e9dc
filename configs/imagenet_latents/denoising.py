"""DiT-XL/2 on latents of ImageNet at 256 x 256, as published, for its weights.

  diffusionlab --mode=import --weights=DiT-XL-2-256x256.pt \
    --config=configs/imagenet_latents/denoising.py --workdir=runs/dit_xl
  diffusionlab --mode=sample --workdir=runs/dit_xl --num_samples=16

The data here are generated ones of the right shape, which is all that an import, a
sample and most methods of distillation look at. Samples are latents, 0.18215 times
those of the autoencoder, which is no part of this project: decode them with one. To
train, give `data.source` an .npz file of latents in the same units. `:512` is the
network for latents of 64 x 64.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant, ("", "512", "smoke"))
    config = common.get_config()
    side = 64 if variant == "512" else 32
    config.data = dict(
        source=dict(
            name="generated", shape=(side, side, 4), num_classes=1000, size=1000
        ),
        batch_size=256,
    )
    config.process = dict(
        name="gaussian", prediction="eps", schedule=dict(name="discrete_beta")
    )
    config.objective.times = dict(name="discrete", num_timesteps=1000)
    config.networks = dict(denoiser=dict(name="peebles_dit"))
    config.optim = dict(
        denoiser=dict(
            name="adamw",
            learning_rate=dict(name="constant", value=1e-4),
            options=dict(b2=0.999),
            weight_decay=0.0,
        )
    )
    config.ema.main.decay = 0.9999
    config.train = dict(num_steps=400_000)
    config.sampler = dict(name="ddim", num_steps=250, grid=dict(name="discrete"))
    config.guidance = dict(classifier_free=dict(guidance_scale=4.0))
    config.checkpoint = dict(every=5000, keep_every=50_000)
    config.logging = dict(every=100, samples_every=10_000, num_samples=64)
    if variant == "smoke":
        common.shrink(config)
        config.data.source.update(shape=(8, 8, 4), num_classes=4, size=64)
        config.networks.denoiser.update(width=32, num_layers=2, num_heads=2)
    return config
