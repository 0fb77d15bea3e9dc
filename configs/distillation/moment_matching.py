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
    # The auxiliary network has to keep up with the student, and learns on while that
    # comes to rest: what it lags behind is bias.
    student, aux, rest, num_steps = 2e-4, 5e-4, 1e-4, 1600
    if variant:
        student, aux, rest, num_steps = 1e-3, 3e-3, 1e-3, 12_000
        # w = min(SNR, 50,000): unbounded, the least noise has most of the gradient.
        config.objective.weighting = dict(name="min_snr", gamma=50_000.0)
    config.train.num_steps = num_steps
    updates = num_steps // 2
    config.optim = dict(
        student=common.adam(student, updates, b1=0.0),
        aux=common.adam(aux, updates, b1=0.0),
    )
    config.optim.aux.learning_rate.final_value = rest
    for block in config.optim.values():
        block.options.eps = 1e-12
    if variant == "smoke":
        common.shrink_student(config)
    return config
