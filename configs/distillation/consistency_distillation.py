"""Consistency distillation: any number of steps, each of which ends at a sample.

  diffusionlab --config=configs/distillation/consistency_distillation.py \
    --config.teacher=runs/digits --workdir=runs/digits_consistency

Other numbers of steps need no training: --mode=sample --config.sampler.num_steps=4.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("consistency_distillation", variant, num_steps=2)
    del config.objective.num_steps
    # -2 log 80: the noisiest of EDM's levels, from where they are trained.
    grid = dict(name="from", first_logsnr=-8.76)
    config.sampler = dict(name="consistency", num_steps=2, grid=grid)
    config.objective.update(
        grid=dict(name="rho"), num_levels=24, gap_weight=True, huber_scale=0.03
    )
    num_steps = 4000 if variant else 1500
    config.optim.student = common.adam(5e-4 if variant else 2e-4, num_steps)
    config.train.num_steps = num_steps
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 2
    return config
