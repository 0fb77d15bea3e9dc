"""Diff-Instruct: a generator whose noisy samples get the teacher's scores.

  diffusionlab --config=configs/distillation/diff_instruct.py \
    --config.teacher=runs/digits --workdir=runs/digits_diff_instruct
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("diff_instruct", variant, num_steps=1)
    first_logsnr = ml_collections.FieldReference(-4.0)
    config.objective.update(first_logsnr=first_logsnr, times=dict(name="uniform"))
    grid = dict(name="from", first_logsnr=first_logsnr)
    config.sampler.update(name="consistency", grid=grid)
    config.optim = dict(
        student=common.adam(5e-4, 2000, b1=0.0), aux=common.adam(1e-3, 2000, b1=0.0)
    )
    config.train.num_steps = 4000
    if variant == "smoke":
        common.shrink_student(config)
    return config
