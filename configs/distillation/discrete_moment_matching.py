"""Discrete moment matching: a sampler of tokens in a few steps, fed with noise.

  diffusionlab --config=configs/distillation/discrete_moment_matching.py \
    --config.teacher=runs/text --workdir=runs/text_discrete_moment_matching
  diffusionlab --config=configs/distillation/discrete_moment_matching.py:digits \
    --config.teacher=runs/digits_tokens --workdir=runs/digits_tokens_moments

A teacher of uniform noise takes --config.objective.weight=one,
--config.objective.input_noise=none and --config.objective.targets=hard: its z_t are
random without more.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = common.token_distillation("discrete_moment_matching", variant, num_steps=8)
    config.objective.update(input_noise="pyramid" if variant else "gaussian")
    config.objective.targets = "soft"
    config.networks = dict(denoiser=dict(noise_input=4 if variant else 16))
    # One half each of student and auxiliary network.
    config.train.num_steps = 1200
    config.optim = dict(
        student=common.adam(5e-4, 600, b1=0.0), aux=common.adam(5e-4, 600, b1=0.0)
    )
    for block in config.optim.values():
        block.options.eps = 1e-12
    if variant == "smoke":
        common.shrink_student(config)
    return config
