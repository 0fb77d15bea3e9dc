"""Multistep consistency distillation: a few steps of DDIM, learned with a teacher.

  diffusionlab --config=configs/distillation/multistep_consistency.py \
    --config.teacher=runs/digits --workdir=runs/digits_multistep_consistency
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("multistep_consistency", variant, num_steps=8)
    if variant == "smoke":
        common.shrink_student(config)
    return config
