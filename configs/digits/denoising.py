"""Handwritten digits: a class-conditional DiT on scikit-learn's 8 x 8 images.

The recipe of simple diffusion (arXiv 2301.11093) at the smallest real size.

  diffusionlab --config=configs/digits/denoising.py --workdir=runs/digits
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    config.data = dict(source=dict(name="digits"), batch_size=128)
    config.process = dict(
        name="gaussian", prediction="v", schedule=dict(name="cosine")
    )
    config.networks = dict(
        denoiser=dict(
            name="dit", patch_size=2, width=96, num_layers=4, num_heads=4, unroll=True
        )
    )
    config.objective = dict(
        name="denoising",
        weighting=dict(name="eps"),
        times=dict(name="uniform"),
        label_dropout=0.1,
    )
    config.optim = dict(
        denoiser=dict(
            name="adam",
            learning_rate=dict(
                name="cosine", value=2e-3, warmup_steps=100, decay_steps=1500
            ),
            options=dict(b2=0.99),
        )
    )
    config.train = dict(num_steps=1500)
    config.sampler = dict(name="ancestral", num_steps=64, noise_exponent=0.3)
    config.guidance = dict(classifier_free=dict(guidance_scale=1.0), clip_x=dict())
    config.evals = dict(
        held_out=dict(name="denoising_loss"),
        samples=dict(name="samples", num_samples=1000),
    )
    config.checkpoint = dict(every=500)
    config.logging = dict(every=50, samples_every=500, num_samples=100)
    if variant == "smoke":
        config.data.batch_size = 16
        config.networks.denoiser.width = 16
        config.networks.denoiser.num_layers = 1
        config.train.num_steps = 10
        config.optim.denoiser.learning_rate.warmup_steps = 2
        config.optim.denoiser.learning_rate.decay_steps = 10
        config.sampler.num_steps = 4
        config.evals.samples.num_samples = 40
        config.checkpoint.every = 5
        config.logging.every = 2
        config.logging.samples_every = 5
        config.logging.num_samples = 20
    return config
