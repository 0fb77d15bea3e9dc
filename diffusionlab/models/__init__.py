"""Networks: the only rooms that import flax.linen."""

REGISTRY = {
    "network": {
        "dit": "diffusionlab.models.dit:DiT",
        "mlp": "diffusionlab.models.mlp:MLP",
        "uvit": "diffusionlab.models.uvit:UViT",
    }
}
