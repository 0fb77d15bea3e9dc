"""f-divergence distillation: DMD2 with a weight on each sample by its density ratio.

  diffusionlab --config=configs/distillation/f_divergence.py \
    --config.teacher=runs/digits --workdir=runs/digits_f_divergence
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("f_divergence", variant, num_steps=1)
    common.generator(config, first_logsnr=-8.764)
    config.objective.times = dict(name="uniform")
    if variant:
        # More updates of the student pay where several steps share one aux.
        config.objective.aux_steps = 2
    config.train.num_steps = 3600
    rate = 1e-3 if variant else 3e-4
    config.optim.student = common.adam(rate, 1200, b1=0.0)
    config.optim.aux = common.adam(rate, 3000, b1=0.0)
    common.discriminator(config, variant)
    if variant == "smoke":
        common.shrink_student(config)
    return config
