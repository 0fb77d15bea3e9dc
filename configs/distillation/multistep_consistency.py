"""Multistep consistency: a few steps of DDIM, learned with a teacher or from data.

  diffusionlab --config=configs/distillation/multistep_consistency.py \
    --config.teacher=runs/digits --workdir=runs/digits_multistep_consistency

`--config.objective.num_steps` is the number of steps of the student, 1 to 16, and
`--config.objective.mode=training` asks the teacher for its parameters alone.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("multistep_consistency", variant, num_steps=8)
    config.train.num_steps = 10_000
    config.objective.anneal_steps = 8_000
    config.optim.student = common.adam(5e-4, config.train.num_steps)
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.anneal_steps = 5
    return config
