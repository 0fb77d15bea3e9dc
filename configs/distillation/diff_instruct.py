"""Diff-Instruct: a generator whose noisy samples get the teacher's scores.

  diffusionlab --config=configs/distillation/diff_instruct.py \
    --config.teacher=runs/digits --workdir=runs/digits_diff_instruct
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("diff_instruct", variant, num_steps=1)
    common.generator(config, first_logsnr=-4.0)
    config.objective.times = dict(name="uniform")
    student, aux, num_steps = (5e-4, 1e-3, 4000) if variant else (2e-4, 5e-4, 1200)
    config.train.num_steps = num_steps
    config.optim = dict(
        student=common.adam(student, num_steps // 2, b1=0.0),
        aux=common.adam(aux, num_steps // 2, b1=0.0),
    )
    if variant == "smoke":
        common.shrink_student(config)
    return config
