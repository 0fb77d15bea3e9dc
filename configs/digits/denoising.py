"""Handwritten digits: a class-conditional DiT on scikit-learn's 8 x 8 images.

The recipe of simple diffusion (arXiv 2301.11093) at the smallest real size.

  diffusionlab --config=configs/digits/denoising.py --workdir=runs/digits

On two CPU cores: about two minutes; 98.5 % of 1,500 samples are recognised as their
class, precision 0.98 and recall 0.88 against held-out digits (real: 0.98 and 0.97).
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    config.data = dict(source=dict(name="digits"), batch_size=128)
    config.networks = dict(
        denoiser=dict(
            name="dit", patch_size=4, width=192, num_layers=4, num_heads=4, unroll=True
        )
    )
    config.optim = dict(
        denoiser=dict(
            name="adam",
            learning_rate=dict(
                name="cosine", value=2e-3, warmup_steps=100, decay_steps=1200
            ),
            options=dict(b2=0.99),
        )
    )
    config.train = dict(num_steps=1200)
    config.sampler = dict(name="ddim", num_steps=64)
    # Clipping x narrows the samples: recall 0.879 without it, 0.865 with it.
    config.guidance = dict(classifier_free=dict(guidance_scale=1.0))
    config.evals.samples = dict(name="samples", num_samples=1500)
    # Held-out digits are the reference, and training digits what a perfect sampler
    # would reach: about as many as there are samples.
    config.evals.quality = dict(
        name="sample_quality",
        extractor=dict(name="digits"),
        metrics=[
            dict(name="frechet"),
            dict(name="class_frechet"),
            dict(name="kernel"),
            dict(name="precision_recall"),
            dict(name="density_coverage"),
            dict(name="inception_score"),
        ],
        num_samples=1500,
        reference="test",
        baseline="train",
        every=600,
    )
    # Copies are looked for among what was trained on.
    config.evals.copies = dict(
        name="sample_quality",
        extractor=dict(name="digits"),
        metrics=[dict(name="memorization")],
        num_samples=1500,
        reference="train",
        baseline="test",
    )
    config.checkpoint = dict(every=600, best="quality/frechet", best_mode="min")
    config.logging = dict(every=50, samples_every=400, num_samples=100)
    if variant == "smoke":
        common.shrink(config)
        config.networks.denoiser.update(width=16, num_layers=1)
    return config
