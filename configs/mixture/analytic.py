"""A solved problem: gaussian mixtures with their exact denoiser in the network's place.

Nothing is trained. The run is finished in seconds, and is sampled, evaluated, guided,
distilled as any other, so a sampler or a method can be tried where the right answer is
known. `:gaussian` has the best affine denoiser instead,
`:unlabelled` no labels.

  diffusionlab --config=configs/mixture/analytic.py --workdir=runs/solved

On two CPU cores: ten seconds.
"""

import ml_collections

from configs import common
from configs.mixture import denoising


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant, ("", "gaussian", "unlabelled", "smoke"))
    of_data = variant if variant in ("smoke", "unlabelled") else ""
    config = denoising.get_config(of_data)
    network = "gaussian" if variant == "gaussian" else "gaussian_mixture"
    config.networks = dict(denoiser=dict(name=network))
    if variant != "smoke":
        config.train.num_steps = 0
        config.logging.samples_every = 1
    return config
