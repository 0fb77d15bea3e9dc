"""Networks: the only rooms that import flax.linen."""

REGISTRY = {
    "network": {
        "causal_transformer": "diffusionlab.models.causal_transformer:"
        "CausalTransformer",
        "classifier": "diffusionlab.models.classifier:Classifier",
        "discriminator": "diffusionlab.models.discriminator:Discriminator",
        "dit": "diffusionlab.models.dit:DiT",
        "gaussian": "diffusionlab.models.analytic:Gaussian",
        "gaussian_mixture": "diffusionlab.models.analytic:GaussianMixture",
        "mlp": "diffusionlab.models.mlp:MLP",
        "peebles_dit": "diffusionlab.models.peebles_dit:PeeblesDiT",
        "token_transformer": "diffusionlab.models.token_transformer:TokenTransformer",
        "uncertainty": "diffusionlab.models.uncertainty:Uncertainty",
        "uvit": "diffusionlab.models.uvit:UViT",
    }
}
