"""diffusionlab: train, sample, distil and evaluate diffusion models from a config."""

__version__ = "0.1.0"
