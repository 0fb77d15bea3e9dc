"""Objectives that train from data, and the weightings of their losses."""

REGISTRY = {
    "objective": {
        "denoising": "diffusionlab.objectives.denoising:Denoising",
        "discrete": "diffusionlab.objectives.discrete:Discrete",
        "language_model": "diffusionlab.objectives.language_model:LanguageModel",
        "noisy_classification": "diffusionlab.objectives.noisy_classification:"
        "NoisyClassification",
    },
    "weighting": {
        "eps": "diffusionlab.objectives.weightings:Eps",
        "x": "diffusionlab.objectives.weightings:X",
        "v": "diffusionlab.objectives.weightings:V",
        "velocity": "diffusionlab.objectives.weightings:Velocity",
        "edm": "diffusionlab.objectives.weightings:Edm",
        "min_snr": "diffusionlab.objectives.weightings:MinSnr",
        "p2": "diffusionlab.objectives.weightings:P2",
        "elbo": "diffusionlab.objectives.weightings:Elbo",
        "sigmoid": "diffusionlab.objectives.weightings:Sigmoid",
        "sigmoid_uniform": "diffusionlab.objectives.weightings:SigmoidUniform",
    },
}
