"""CIFAR-10 through tensorflow-datasets, with a DiT.

The data are prepared once, by the one program here that needs TensorFlow; the error
message that names the missing data gives the command.

  diffusionlab --config=configs/cifar10/denoising.py --workdir=runs/cifar10

Full size is meant for one accelerator and has not been trained by us; the variant
'smoke' runs on generated data of the same shape.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    batch_size = 256
    num_steps = common.steps_of_epochs(1000, 50_000, batch_size)
    config.data = dict(
        source=dict(name="tfds", dataset="cifar10"),
        batch_size=batch_size,
        augment=dict(flip=dict(probability=0.5)),
        num_threads=8,
    )
    config.networks = dict(
        denoiser=dict(
            name="dit",
            patch_size=2,
            width=512,
            num_layers=12,
            num_heads=8,
            dropout=0.1,
        )
    )
    config.objective.weighting = dict(name="sigmoid", bias=2.0)
    config.optim = dict(
        denoiser=dict(
            name="adam",
            learning_rate=dict(
                name="cosine", value=3e-4, warmup_steps=5000, decay_steps=num_steps
            ),
            options=dict(b2=0.99),
        )
    )
    config.ema.main.decay = 0.9999
    config.ema.short = dict(name="power", sigma_rel=0.05)
    config.ema.long = dict(name="power", sigma_rel=0.10)
    config.train = dict(num_steps=num_steps)
    config.precision = dict(compute="bfloat16")
    config.sampler = dict(name="ancestral", num_steps=256, noise_exponent=0.3)
    config.evals.samples = dict(name="samples", num_samples=1000, every=20_000)
    config.checkpoint = dict(every=5000, keep_every=20_000)
    config.logging = dict(every=100, samples_every=5000, num_samples=100)
    if variant == "smoke":
        common.shrink(config)
        config.data.source = dict(name="generated", shape=(32, 32, 3), size=128)
        config.networks.denoiser.update(
            patch_size=4, width=16, num_layers=1, num_heads=2
        )
    return config
