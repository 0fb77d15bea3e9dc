"""DMD2: distribution matching with a discriminator, in one or a few steps.

  diffusionlab --config=configs/distillation/distribution_matching_2.py \
    --config.teacher=runs/digits --workdir=runs/digits_distribution_matching_2

The variants 'plain' and 'mixture_plain' are without the discriminator.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    size = variant.removesuffix("plain").removesuffix("_")
    config = common.distillation("distribution_matching_2", size, num_steps=4)
    common.generator(config, first_logsnr=-8.764)
    config.objective.times = dict(name="uniform")
    # More updates of the student pay where several steps share one aux.
    config.objective.aux_steps = 2
    student, aux, num_steps = (1e-3, 1e-3, 3600) if size else (2e-4, 5e-4, 1200)
    config.train.num_steps = num_steps
    config.optim.student = common.adam(student, num_steps // 3, b1=0.0)
    config.optim.aux = common.adam(aux, num_steps * 5 // 6, b1=0.0)
    if variant.endswith("plain"):
        config.objective.gan_weight = 0.0
    else:
        common.discriminator(config, size)
    if variant == "smoke":
        common.shrink_student(config)
    return config
