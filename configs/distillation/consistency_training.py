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
    config.sampler.name = "consistency"
    config.objective.update(
        grid=dict(name="uniform"),
        first_levels=8,
        last_levels=256,
        curriculum_steps=config.train.num_steps,
    )
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 2
        config.objective.update(first_levels=2, last_levels=8, curriculum_steps=9)
    return config
