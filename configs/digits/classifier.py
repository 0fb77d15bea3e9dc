"""A classifier of noisy digits, for classifier guidance of the runs of denoising.py.

It is trained at the times of the cosine schedule, which the guided run must share.

  diffusionlab --config=configs/digits/classifier.py --workdir=runs/classifier

On two busy CPU cores: about two minutes; on held-out digits a loss of 0.92 and 67 %
right over all times, 98 % and more where logsnr is above 3.

Classifier guidance: Dhariwal and Nichol 2021 (arXiv 2105.05233).
"""

import ml_collections

from configs import common
from configs.digits import denoising


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = denoising.get_config(variant)
    config.networks = dict(
        classifier=dict(
            name="classifier", patch_size=4, width=128, num_layers=2, num_heads=4
        )
    )
    config.objective = dict(name="noisy_classification", times=dict(name="uniform"))
    config.optim = dict(classifier=config.optim.denoiser)
    config.guidance = dict()
    config.evals = dict(held_out=config.evals.held_out)
    config.checkpoint.best = ""
    # There is nothing to sample.
    config.logging.samples_every = 0
    if variant == "smoke":
        config.networks.classifier.update(width=16, num_layers=1)
    return config
