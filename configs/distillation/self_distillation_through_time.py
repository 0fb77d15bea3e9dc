"""Self-distillation through time: masked tokens in rounds, each of half the steps.

  diffusionlab --config=configs/distillation/self_distillation_through_time.py \
    --config.teacher=runs/text --workdir=runs/text_self_distillation
  diffusionlab --config=configs/distillation/self_distillation_through_time.py:digits \
    --config.teacher=runs/digits_tokens --workdir=runs/digits_tokens_self

The teacher of the first round makes `objective.num_steps` 2^`objective.num_rounds`
steps; `train.num_steps` is the rounds' number times their length.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.token_distillation(
        "self_distillation_through_time", variant, num_steps=8
    )
    rounds, steps = 3, 400
    config.objective.update(num_rounds=rounds, steps_per_round=steps)
    config.train.num_steps = rounds * steps
    config.optim.student = common.adam(3e-4, steps)
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.update(num_rounds=3, steps_per_round=3)
        config.train.num_steps = 10
    return config
