"""Moment matching in parameter space: no auxiliary network, the teacher's gradient.

  diffusionlab --config=configs/distillation/moment_matching_instant.py \
    --config.teacher=runs/digits --workdir=runs/digits_moment_matching_instant

The teacher has to have been trained, by Adam: of the mixture it is runs/mixture, as the
exact denoiser has few parameters.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.distillation("moment_matching_instant", variant, num_steps=8)
    config.objective.update(weighting=dict(name="v"), times_option="grid")
    config.sampler = dict(
        name="ancestral",
        num_steps=config.objective.get_ref("num_steps"),
        noise_exponent=0.0,
    )
    rate, config.train.num_steps = 1e-4, 1000
    if variant == "mixture":
        rate, config.train.num_steps = 3e-4, 4000
        config.teacher.update(run="runs/mixture", start="")
        config.data.batch_size = 512
    config.optim = dict(student=common.adam(rate, config.train.num_steps, b1=0.0))
    config.optim.student.options.eps = 1e-12
    if variant == "smoke":
        common.shrink_student(config)
    return config
