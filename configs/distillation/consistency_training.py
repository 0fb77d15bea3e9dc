"""Consistency training (iCT, ECT): from data, starting as the teacher.

  diffusionlab --config=configs/distillation/consistency_training.py \
    --config.teacher=runs/digits --workdir=runs/digits_consistency_training

Other numbers of steps need no training: --mode=sample --config.sampler.num_steps=4.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("consistency_training", variant, num_steps=2)
    del config.objective.num_steps
    # -2 log 80: the noisiest of EDM's levels, from where they are trained.
    grid = dict(name="from", first_logsnr=-8.76)
    config.sampler = dict(name="consistency", num_steps=2, grid=grid)
    num_steps = 4000 if variant else 1500
    config.objective.update(
        grid=dict(name="rho"),
        first_levels=8,
        last_levels=64,
        curriculum_steps=num_steps,
        huber_scale=0.03,
    )
    config.optim.student = common.adam(5e-4 if variant else 2e-4, num_steps)
    config.train.num_steps = num_steps
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 2
        config.objective.update(first_levels=2, last_levels=8, curriculum_steps=9)
    return config
