"""TRACT: phases of training, each with a fraction of the steps of the one before.

  diffusionlab --config=configs/distillation/tract.py \
    --config.teacher=runs/digits --workdir=runs/digits_tract

`train.num_steps` is the number of phases, two, times their length.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("tract", variant, num_steps=1)
    steps = 2500 if variant else 600
    config.objective.update(
        teacher_steps=1024, middle_steps=(32,), steps_per_phase=steps
    )
    # A thousandth of a phase's first parameters is left at its end.
    slow = 1e-3 ** (1 / steps)
    config.ema = dict(
        main=dict(name="exponential", decay=slow, warmup=False),
        self=dict(name="exponential", decay=0.5, warmup=False),
    )
    config.train.num_steps = 2 * steps
    config.optim.student = common.adam(5e-4, steps)
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.update(teacher_steps=16, middle_steps=(4,), steps_per_phase=4)
        config.train.num_steps = 10
    return config
