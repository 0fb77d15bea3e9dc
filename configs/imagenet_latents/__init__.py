"""ImageNet as latents of an autoencoder, `[H, W, 4]`."""
