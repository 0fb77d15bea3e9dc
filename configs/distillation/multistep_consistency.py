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
    config.train.num_steps = 1000
    config.objective.update(anneal_steps=800, last_teacher_steps=512)
    config.optim.student = common.adam(3e-4, 1000)
    if variant == "mixture":
        config.train.num_steps = 5000
        config.objective.update(anneal_steps=4000, last_teacher_steps=256)
        config.optim.student = common.adam(5e-4, 5000)
        # One step ends at a third of the distance to the data that the other weight
        # leaves; for two steps and more it is the other one that is a little nearer.
        config.objective.weight = "snr+1"
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.anneal_steps = 5
    return config
