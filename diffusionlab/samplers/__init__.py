"""From noise to data."""

REGISTRY = {
    "sampler": {
        "ancestral": "diffusionlab.samplers.ancestral:Ancestral",
        "ddim": "diffusionlab.samplers.ddim:Ddim",
    },
    "grid": {
        "uniform": "diffusionlab.samplers.grids:Uniform",
        "quadratic": "diffusionlab.samplers.grids:Quadratic",
        "logsnr": "diffusionlab.samplers.grids:Logsnr",
        "rho": "diffusionlab.samplers.grids:Rho",
        "shifted": "diffusionlab.samplers.grids:Shifted",
        "custom": "diffusionlab.samplers.grids:Custom",
    },
}
