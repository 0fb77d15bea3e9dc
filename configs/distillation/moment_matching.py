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
    # The auxiliary network has to keep up with the student.
    rates = dict(student=1e-4, aux=2e-4)
    config.train.num_steps = 4000
    if variant != "":
        rates = dict(student=1e-3, aux=5e-3)
        config.train.num_steps = 12_000
        # w = min(SNR, 10,000): unbounded, the least noise has most of the gradient.
        config.objective.weighting = dict(name="min_snr", gamma=10_000.0)
    updates = config.train.num_steps // 2
    config.optim = {role: common.adam(rates[role], updates, b1=0.0) for role in rates}
    # It learns on while the student comes to rest: what it lags behind is bias.
    config.optim.aux.learning_rate.final_value = rates["aux"] / 5
    for block in config.optim.values():
        block.options.eps = 1e-12
    if variant == "smoke":
        common.shrink_student(config)
    return config
