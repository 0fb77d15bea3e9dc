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
    # More updates of the student pay where several steps share one aux.
    config.objective.aux_steps = 2
    student, aux, num_steps = (1e-3, 1e-3, 3600) if variant else (2e-4, 5e-4, 1200)
    config.train.num_steps = num_steps
    config.optim.student = common.adam(student, num_steps // 3, b1=0.0)
    config.optim.aux = common.adam(aux, num_steps * 5 // 6, b1=0.0)
    common.discriminator(config, variant)
    if variant == "smoke":
        common.shrink_student(config)
    return config
