"""From noise to data."""

REGISTRY = {
    "sampler": {
        "ancestral": "diffusionlab.samplers.ancestral:Ancestral",
        "ddim": "diffusionlab.samplers.ddim:Ddim",
    }
}
