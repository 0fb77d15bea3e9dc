"""Distribution matching (DMD): a generator, moved by the difference of two scores.

  diffusionlab --config=configs/distillation/distribution_matching.py \
    --config.teacher=runs/digits --workdir=runs/digits_distribution_matching

The variants 'pairs' and 'mixture_pairs' have the paper's regression on pairs of the
teacher, too, and so one step.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    size = variant.removesuffix("pairs").removesuffix("_")
    config = common.distillation("distribution_matching", size, num_steps=1)
    common.generator(config, first_logsnr=-1.83)
    config.objective.update(times=dict(name="uniform"), regression_weight=0.0)
    if variant.endswith("pairs"):
        config.objective.regression_weight = 0.25
        config.objective.sampler = dict(name="ddim", num_steps=64)
    student, aux, num_steps = (1e-3, 1e-3, 4000) if size else (2e-4, 5e-4, 1200)
    config.train.num_steps = num_steps
    config.optim.student = common.adam(student, num_steps // 2, b1=0.0)
    config.optim.aux = common.adam(aux, num_steps // 2, b1=0.0)
    if variant == "smoke":
        common.shrink_student(config)
    return config
