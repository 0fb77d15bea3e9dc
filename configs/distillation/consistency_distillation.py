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
    config.sampler.name = "consistency"
    if variant == "":
        config.objective.huber_scale = 0.03
    config.objective.update(grid=dict(name="uniform"), num_levels=64)
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 2
    return config
