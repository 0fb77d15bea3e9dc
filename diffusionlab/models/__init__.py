"""Networks: the only rooms that import flax.linen."""

REGISTRY = {
    "network": {
        "dit": "diffusionlab.models.dit:DiT",
        "gaussian": "diffusionlab.models.analytic:Gaussian",
        "gaussian_mixture": "diffusionlab.models.analytic:GaussianMixture",
        "mlp": "diffusionlab.models.mlp:MLP",
        "uvit": "diffusionlab.models.uvit:UViT",
    }
}
