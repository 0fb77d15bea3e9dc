"""Guided distillation: one call of the student is the teacher's two, at any scale.

  diffusionlab --config=configs/distillation/guided.py \
    --config.teacher=runs/digits --workdir=runs/digits_guided

It samples with the scale `config.objective.sample_guidance_scale`. Fewer steps are a
second stage, with this run as the teacher, at this scale:

  diffusionlab --config=configs/distillation/progressive.py \
    --config.teacher=runs/digits_guided --workdir=runs/digits_guided_progressive
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("guided", variant, num_steps=64)
    del config.objective.num_steps
    config.objective.times = dict(name="uniform")
    config.networks = dict(denoiser=dict(conditions=("guidance_scale",)))
    if variant:
        config.optim.student = common.adam(1e-3, 2000)
    if variant == "smoke":
        common.shrink_student(config)
        config.sampler.num_steps = 4
    return config
