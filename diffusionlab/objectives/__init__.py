"""Objectives that train from data, and the weightings of their losses."""

REGISTRY = {
    "objective": {"denoising": "diffusionlab.objectives.denoising:Denoising"},
    "weighting": {
        "eps": "diffusionlab.objectives.weightings:Eps",
        "x": "diffusionlab.objectives.weightings:X",
        "v": "diffusionlab.objectives.weightings:V",
        "velocity": "diffusionlab.objectives.weightings:Velocity",
        "elbo": "diffusionlab.objectives.weightings:Elbo",
        "sigmoid": "diffusionlab.objectives.weightings:Sigmoid",
        "sigmoid_uniform": "diffusionlab.objectives.weightings:SigmoidUniform",
    },
}
