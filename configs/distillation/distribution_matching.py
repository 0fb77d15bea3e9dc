"""Distribution matching (DMD): a generator, moved by the difference of two scores.

  diffusionlab --config=configs/distillation/distribution_matching.py \
    --config.teacher=runs/digits --workdir=runs/digits_distribution_matching
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("distribution_matching", variant, num_steps=1)
    common.generator(config, first_logsnr=-1.83)
    config.objective.update(times=dict(name="uniform"), regression_weight=0.0)
    config.train.num_steps = 6000
    config.optim.student = common.adam(1e-3, 3000, b1=0.0)
    config.optim.aux = common.adam(1e-3, 3000, b1=0.0)
    if variant == "smoke":
        common.shrink_student(config)
    return config
