"""Handwritten digits as tokens: their 17 levels of grey, hidden and revealed.

Class-conditional masked diffusion (Shi et al. 2024, MD4, arXiv 2406.04329) on the data
of `denoising.py`. Samples leave as images, so what is measured of images is measured of
these, and the bound of the likelihood besides, in bits per pixel.

  diffusionlab --config=configs/digits/tokens.py --workdir=runs/digits_tokens
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    num_steps = 4000
    config.data = dict(source=dict(name="digits"), batch_size=16)
    # scikit-learn's pixels are whole numbers from 0 to 16.
    config.process = dict(
        name="categorical",
        noise="masked",
        levels=17,
        schedule=dict(name="alpha_linear"),
    )
    config.networks = dict(
        denoiser=dict(
            name="token_transformer",
            width=128,
            num_layers=4,
            num_heads=4,
            dropout=0.1,
            time_conditioning=False,
            unroll=True,
        )
    )
    # Weighed alike, not as in the bound: see configs/text/masked.py.
    config.objective = dict(
        name="discrete",
        loss="cross_entropy",
        times=dict(name="uniform"),
        label_dropout=0.1,
    )
    config.optim = dict(
        denoiser=dict(
            name="adam",
            learning_rate=dict(
                name="cosine", value=2e-3, warmup_steps=100, decay_steps=num_steps
            ),
            options=dict(b2=0.99),
        )
    )
    config.train = dict(num_steps=num_steps)
    config.sampler = dict(name="token_ancestral", num_steps=64)
    config.guidance = dict(classifier_free=dict(guidance_scale=1.0))
    config.evals = dict(
        elbo=dict(name="elbo", every=1000),
        samples=dict(name="samples", num_samples=1500),
    )
    config.evals.quality = dict(
        name="sample_quality",
        extractor=dict(name="digits"),
        metrics=[
            dict(name="frechet"),
            dict(name="precision_recall"),
            dict(name="density_coverage"),
        ],
        num_samples=1500,
        reference="test",
        baseline="train",
    )
    config.checkpoint = dict(every=1000)
    config.logging = dict(every=100, samples_every=1000, num_samples=100)
    if variant == "smoke":
        common.shrink(config)
        config.networks.denoiser.update(width=16, num_layers=1, num_heads=2)
    return config
