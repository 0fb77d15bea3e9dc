"""Score identity distillation: a generator without data, by the Fisher divergence.

  diffusionlab --config=configs/distillation/score_identity.py \
    --config.teacher=runs/digits --workdir=runs/digits_score_identity
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("score_identity", variant, num_steps=1)
    common.generator(config, first_logsnr=-1.83)
    config.objective.times = dict(name="log_normal", mean=-1.2, std=1.2)
    student, aux, num_steps = (1e-3, 1e-3, 4000) if variant else (2e-4, 5e-4, 1200)
    config.train.num_steps = num_steps
    config.optim.student = common.adam(student, num_steps // 2, b1=0.0)
    config.optim.aux = common.adam(aux, num_steps // 2, b1=0.0)
    if variant == "smoke":
        common.shrink_student(config)
    return config
