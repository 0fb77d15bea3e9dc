"""Your own folder of images; classes are its sub-folders.

  diffusionlab --config=configs/image_folder/denoising.py --workdir=runs/mine \
      --config.data.source.path=PATH

Images are resized on the shorter side and cropped to `size`. A damaged file stops the
run and is named; with --config.data.source.on_error=skip it is counted and left out.
The variant 'smoke' runs on generated data of the same shape.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    config.data = dict(
        source=dict(name="image_folder", path="images", size=32, on_error="raise"),
        batch_size=64,
        augment=dict(flip=dict(probability=0.5)),
    )
    config.networks = dict(
        denoiser=dict(name="dit", patch_size=2, width=384, num_layers=8, num_heads=6)
    )
    config.optim = dict(
        denoiser=dict(
            name="adam",
            learning_rate=dict(name="constant", value=3e-4, warmup_steps=500),
            options=dict(b2=0.99),
        )
    )
    config.train = dict(num_steps=50_000)
    config.sampler = dict(name="ancestral", num_steps=128, noise_exponent=0.3)
    config.evals.samples = dict(name="samples", num_samples=1000)
    config.checkpoint = dict(every=1000)
    config.logging = dict(every=50, samples_every=1000, num_samples=64)
    if variant == "smoke":
        common.shrink(config)
        config.data.source = dict(name="generated", shape=(32, 32, 3), num_classes=2)
        config.networks.denoiser.update(
            patch_size=4, width=16, num_layers=1, num_heads=2
        )
    return config
