"""CIFAR-10 as 3072 tokens of 256 values: masked diffusion of discrete pixels.

Source: Shi et al. 2024, MD4 (arXiv 2406.04329): linear schedule, batch 256, AdamW with
2e-4 to zero along a cosine, b2 0.99, decay 0.01; 2.75 bits per dimension after 2M steps
of their convolutional network. Ours is a transformer, and has not been trained at full
size by us. Hoogeboom et al. 2026 (arXiv 2603.20155) distil a teacher of this kind, of
Frechet distance 6.4 with 1024 steps.

  diffusionlab --config=configs/cifar10/tokens.py --workdir=runs/cifar10_tokens

The data are prepared as `denoising.py` says; 'smoke' runs on generated data.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    num_steps = 500_000
    config.data = dict(
        source=dict(name="tfds", dataset="cifar10"),
        batch_size=256,
        augment=dict(flip=dict(probability=0.5)),
        num_threads=8,
    )
    config.process = dict(
        name="categorical",
        noise="masked",
        levels=256,
        schedule=dict(name="alpha_linear"),
    )
    config.networks = dict(
        denoiser=dict(
            name="token_transformer",
            width=512,
            num_layers=12,
            num_heads=8,
            dropout=0.1,
            time_conditioning=False,
            chunk=512,
            remat="nothing_saveable",
        )
    )
    config.objective = dict(
        name="discrete", loss="elbo", times=dict(name="uniform"), label_dropout=0.1
    )
    config.optim = dict(
        denoiser=dict(
            name="adamw",
            learning_rate=dict(
                name="cosine", value=2e-4, warmup_steps=2000, decay_steps=num_steps
            ),
            options=dict(b2=0.99),
            weight_decay=0.01,
        )
    )
    config.ema.main.decay = 0.9999
    config.train = dict(num_steps=num_steps, micro_batches=4)
    config.precision = dict(compute="bfloat16")
    config.sampler = dict(name="token_ancestral", num_steps=512)
    config.guidance = dict(classifier_free=dict(guidance_scale=1.0))
    config.evals = dict(
        elbo=dict(name="elbo", every=20_000),
        samples=dict(name="samples", num_samples=1000, every=20_000),
    )
    config.checkpoint = dict(every=5000, keep_every=20_000)
    config.logging = dict(every=100, samples_every=5000, num_samples=100)
    if variant == "smoke":
        common.shrink(config)
        config.data.source = dict(name="generated", shape=(4, 4, 3), size=128)
        config.networks.denoiser.update(width=16, num_layers=1, num_heads=2, chunk=20)
        config.train.micro_batches = 1
    return config
