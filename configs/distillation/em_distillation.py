"""EM distillation: one-step students by maximum likelihood, with Langevin steps.

  diffusionlab --config=configs/distillation/em_distillation.py \
    --config.teacher=runs/digits --workdir=runs/digits_em_distillation
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("em_distillation", variant, num_steps=1)
    common.generator(config, first_logsnr=-4.0)
    config.objective.update(
        num_langevin_steps=8,
        gamma_eps=0.16,
        gamma_z=1.6e-5,
        times=dict(name="uniform"),
    )
    config.optim = dict(
        student=common.adam(5e-4, 4000, b1=0.0), aux=common.adam(1e-3, 4000, b1=0.0)
    )
    config.train.num_steps = 8000
    if variant == "smoke":
        common.shrink_student(config)
    return config
