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
    # Few training times are noisier.
    grid = dict(name="from", first_logsnr=-5.0)
    config.sampler = dict(name="consistency", num_steps=2, grid=grid)
    num_steps = 4000 if variant else 1500
    config.objective.update(
        times=dict(name="log_normal", mean=-1.0, std=1.6), warmup_steps=num_steps // 8
    )
    config.networks = dict(uncertainty=dict(name="uncertainty"))
    # Tangents have the length 1 from first to last: larger rates diverge.
    config.optim = dict(
        student=common.adam(2e-4 if variant else 1e-4, num_steps),
        uncertainty=common.adam(1e-3, num_steps),
    )
    config.train.num_steps = num_steps
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 2
        config.objective.warmup_steps = 5
    return config
