"""Diffusion of text with uniform noise: characters are replaced, none is hidden.

The run of `masked.py` in all but noise and loss. A network has to be told the time: how
far its own characters can be trusted depends on it. Its loss is the bound of Schiff et
al. 2024, UDLM (arXiv 2412.10193).

  diffusionlab --config=configs/text/uniform.py --workdir=runs/text_uniform
  python benchmarks/text_bound.py --run=runs/text_uniform
"""

import ml_collections

from configs import common
from configs.text import masked


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = masked.get_config(variant)
    config.process.noise = "uniform"
    # Near t = 0 the other answer is its own token but for a share that the bound then
    # divides by: after 300 steps of a small network 10.5 nats per token, and this 3.1.
    config.process.prediction = "leave_one_out"
    config.objective.loss = "elbo"
    config.networks.denoiser.time_conditioning = True
    return config
