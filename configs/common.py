"""What every config shares: the blocks in their order, with the usual decisions."""

import ml_collections

VARIANTS = ("", "smoke")


def check_variant(variant: str, accepted=VARIANTS) -> None:
    """Raises ValueError if a config has no such variant; lists those it has."""
    if variant not in accepted:
        named = ", ".join(repr(v) for v in accepted)
        raise ValueError(f"--config: no variant '{variant}'; there are: {named}.")


def get_config() -> ml_collections.ConfigDict:
    """Blocks that are the same for most runs; a config sets the others."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.ema = dict(main=dict(name="exponential", decay=0.999))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.precision = dict(compute="float32")
    config.guidance = dict(classifier_free=dict(guidance_scale=1.0))
    return config
