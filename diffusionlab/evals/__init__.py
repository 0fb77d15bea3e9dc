"""Evaluators: from samples, data and losses to named numbers and pictures."""

REGISTRY = {
    "evaluator": {
        "denoising_loss": "diffusionlab.evals.denoising_loss:DenoisingLoss",
        "mixture": "diffusionlab.evals.mixture:Mixture",
        "samples": "diffusionlab.evals.samples:Samples",
    }
}
