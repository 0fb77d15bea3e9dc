"""32 x 32 crops of scikit-learn's two sample photographs, with a small U-ViT.

Real colour images that are there wherever the package is; classes are the photographs.

  diffusionlab --config=configs/photos/denoising.py --workdir=runs/photos
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    config.data = dict(
        source=dict(name="photos", size=32),
        batch_size=64,
        augment=dict(flip=dict(probability=0.5)),
    )
    config.networks = dict(
        denoiser=dict(
            name="uvit",
            channels=(64,),
            num_blocks=2,
            patch_size=2,
            width=256,
            num_layers=6,
            num_heads=4,
        )
    )
    config.optim = dict(
        denoiser=dict(
            name="adamw",
            learning_rate=dict(name="constant", value=3e-4, warmup_steps=500),
            options=dict(b2=0.99),
            weight_decay=0.01,
        )
    )
    config.train = dict(num_steps=20_000)
    config.sampler = dict(name="ancestral", num_steps=128, noise_exponent=0.3)
    config.evals.samples = dict(name="samples", num_samples=1000)
    config.checkpoint = dict(every=1000)
    config.logging = dict(every=50, samples_every=1000, num_samples=64)
    if variant == "smoke":
        common.shrink(config)
        config.networks.denoiser.update(
            channels=(8,), num_blocks=1, width=16, num_layers=1, emb_width=16
        )
    return config
