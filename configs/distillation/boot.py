"""BOOT: one step, from the teacher's probability flow, without data.

  diffusionlab --config=configs/distillation/boot.py \
    --config.teacher=runs/digits --workdir=runs/digits_boot
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("boot", variant, num_steps=1)
    del config.objective.num_steps
    config.networks = dict(denoiser=dict(conditions=("target_logsnr",)))
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 1
    return config
