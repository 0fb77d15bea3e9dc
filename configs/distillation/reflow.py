"""Reflow: straight paths between noise and the teacher's own samples of it.

  diffusionlab --config=configs/distillation/reflow.py \
    --config.teacher=runs/digits --workdir=runs/digits_reflow

Again with --config.teacher=runs/digits_reflow, or for one step with
--config.teacher.start=runs/digits_reflow --config.objective.mode=distil.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("reflow", variant, num_steps=2)
    pairs, rate, num_steps = (20_000, 1e-3, 4000) if variant else (5000, 5e-4, 1200)
    config.objective.update(
        num_pairs=pairs,
        sampler=dict(name="heun", num_steps=32, grid=dict(name="rho")),
        mode="reflow",
    )
    config.sampler.grid = dict(name="straight")
    config.train.num_steps = num_steps
    config.optim = dict(student=common.adam(rate, num_steps))
    if variant == "smoke":
        common.shrink_student(config)
        config.objective.num_pairs = 100
        config.objective.sampler.num_steps = 8
    return config
