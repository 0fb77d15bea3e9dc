"""From noise to data."""

REGISTRY = {
    "sampler": {
        "ancestral": "diffusionlab.samplers.ancestral:Ancestral",
        "covariance": "diffusionlab.samplers.covariance:Covariance",
        "ddim": "diffusionlab.samplers.ddim:Ddim",
        "addim": "diffusionlab.samplers.addim:Addim",
        "consistency": "diffusionlab.samplers.consistency:Consistency",
        "euler": "diffusionlab.samplers.edm:Euler",
        "heun": "diffusionlab.samplers.edm:Heun",
        "euler_maruyama": "diffusionlab.samplers.sde:EulerMaruyama",
        "predictor_corrector": "diffusionlab.samplers.sde:PredictorCorrector",
        "restart": "diffusionlab.samplers.restart:Restart",
        "probability_flow": "diffusionlab.samplers.probability_flow:ProbabilityFlow",
        "dpm_solver_1s": "diffusionlab.samplers.dpm_solver:Dpm1S",
        "dpm_solver_2s": "diffusionlab.samplers.dpm_solver:Dpm2S",
        "dpm_solver_2m": "diffusionlab.samplers.dpm_solver:Dpm2M",
        "dpm_solver_3m": "diffusionlab.samplers.dpm_solver:Dpm3M",
        "unipc": "diffusionlab.samplers.unipc:UniPC",
        "deis": "diffusionlab.samplers.multistep:Deis",
        "adams_bashforth": "diffusionlab.samplers.multistep:AdamsBashforth",
        "runge_kutta_4": "diffusionlab.samplers.runge_kutta:RungeKutta4",
        "gradient_estimation": (
            "diffusionlab.samplers.gradient_estimation:GradientEstimation"
        ),
    },
    "grid": {
        "uniform": "diffusionlab.samplers.grids:Uniform",
        "quadratic": "diffusionlab.samplers.grids:Quadratic",
        "logsnr": "diffusionlab.samplers.grids:Logsnr",
        "rho": "diffusionlab.samplers.grids:Rho",
        "shifted": "diffusionlab.samplers.grids:Shifted",
        "discrete": "diffusionlab.samplers.grids:Discrete",
        "from": "diffusionlab.samplers.grids:From",
        "straight": "diffusionlab.samplers.grids:Straight",
        "custom": "diffusionlab.samplers.grids:Custom",
    },
    "basis": {
        "dct_block": "diffusionlab.samplers.bases:DctBlock",
        "dct_conv": "diffusionlab.samplers.bases:DctConv",
        "dct_global": "diffusionlab.samplers.bases:DctGlobal",
        "fft_global": "diffusionlab.samplers.bases:FftGlobal",
        "lanczos": "diffusionlab.samplers.bases:Lanczos",
        "oracle": "diffusionlab.samplers.bases:Oracle",
        "pixel_isotropic": "diffusionlab.samplers.bases:PixelIsotropic",
    },
}
