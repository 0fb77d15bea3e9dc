"""Every sampler on the digits: quality by the number of network evaluations.

The digits of `denoising.py`, evaluated by nothing but the comparison of samplers, so it
evaluates a run of that config as well as one of its own:

  diffusionlab --config=configs/digits/samplers.py --workdir=runs/digits --mode=eval

The result is runs/digits/evals/step_00001200_samplers_frechet.png, with the numbers in
step_00001200_samplers.json beside it. On two CPU cores: about five minutes.
"""

import ml_collections

from configs import common
from configs.digits import denoising
from diffusionlab import registry

# Where a sampler's usual grid is not uniform in t.
_RHO, _LOGSNR = dict(name="rho"), dict(name="logsnr")
_GRIDS = dict(
    euler=_RHO, heun=_RHO, runge_kutta_4=_RHO, restart=_RHO, euler_maruyama=_LOGSNR
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = denoising.get_config(variant)
    config.evals = dict(
        samplers=dict(
            name="sampler_comparison",
            samplers=[
                dict(name=name, num_steps=1, grid=_GRIDS.get(name))
                for name in registry.table("sampler")
                if not name.startswith("token_")
            ],
            num_evaluations=(4, 8, 16, 32, 64),
            num_samples=1000,
        )
    )
    config.checkpoint.best = ""
    # Drawn so many at a time.
    config.logging.num_samples = 500
    if variant == "smoke":
        config.evals.samplers.update(
            samplers=(dict(name="ddim", num_steps=1),),
            num_evaluations=(2,),
            num_samples=40,
        )
        config.logging.num_samples = 20
    return config
