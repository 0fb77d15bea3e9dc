"""Consistency models in continuous time (sCM), by distillation or from data.

  diffusionlab --config=configs/distillation/continuous_consistency.py \
    --config.teacher=runs/digits --workdir=runs/digits_continuous_consistency

`--config.objective.mode=training` is sCT. Other numbers of steps need no training:
--mode=sample --config.sampler.num_steps=4.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("continuous_consistency", variant, num_steps=2)
    del config.objective.num_steps
    config.sampler.name = "consistency"
    config.objective.update(
        times=dict(name="log_normal", mean=-1.0, std=1.4), warmup_steps=500
    )
    config.networks = dict(uncertainty=dict(name="uncertainty"))
    config.optim.uncertainty = common.adam(1e-3, 2000)
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 2
        config.objective.warmup_steps = 5
    return config
