"""Moment matching: a stochastic sampler of a few steps, with an auxiliary denoiser.

  diffusionlab --config=configs/distillation/moment_matching.py \
    --config.teacher=runs/digits --workdir=runs/digits_moment_matching
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("moment_matching", variant, num_steps=8)
    config.objective.update(weighting=dict(name="v"), times_option="grid")
    config.sampler = dict(
        name="ancestral",
        num_steps=config.objective.get_ref("num_steps"),
        noise_exponent=0.0,
    )
    config.train.num_steps = 10_000
    updates = config.train.num_steps // 2
    config.optim = {
        role: common.adam(rate, updates, b1=0.0)
        for role, rate in (("student", 3e-4), ("aux", 1e-3))
    }
    for block in config.optim.values():
        block.options.eps = 1e-12
    if variant == "smoke":
        common.shrink_student(config)
    return config
