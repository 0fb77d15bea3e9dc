"""How data become noise."""

REGISTRY = {
    "process": {
        "categorical": "diffusionlab.processes.categorical:Categorical",
        "gaussian": "diffusionlab.processes.gaussian:Gaussian",
    }
}
