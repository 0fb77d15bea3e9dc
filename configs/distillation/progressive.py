"""Progressive distillation: rounds, each with half the steps of the one before.

  diffusionlab --config=configs/distillation/progressive.py \
    --config.teacher=runs/digits --workdir=runs/digits_progressive

The teacher of the first round makes `objective.num_steps` 2^`objective.num_rounds`
steps; `train.num_steps` is the rounds' number times their length.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("progressive", variant, num_steps=8)
    rounds, steps = 6, 700 if variant else 200
    config.objective.update(num_rounds=rounds, steps_per_round=steps)
    config.train.num_steps = rounds * steps
    config.optim.student = common.adam(5e-4, steps)
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.update(num_rounds=3, steps_per_round=3)
        config.train.num_steps = 10
    return config
