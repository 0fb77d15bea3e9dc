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
    config.train.num_steps = 8000
    config.objective.update(anneal_steps=6000, last_teacher_steps=256)
    config.optim.student = common.adam(5e-4, config.train.num_steps)
    if variant == "mixture":
        # A third of the distance of the other weight for one step, as far for eight.
        config.objective.weight = "snr+1"
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.anneal_steps = 5
    return config
