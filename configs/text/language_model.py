"""A language model of characters: what samples of text are judged by.

It is trained on the text of the diffusion runs of this folder, and must not be one of
them: a reference that is close to the generator finds its samples better than they are.

  diffusionlab --config=configs/text/language_model.py --workdir=runs/language_model
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.check_variant(variant)
    config = common.get_config()
    num_steps = 3000
    config.data = dict(
        source=dict(name="text", corpus="pydoc", length=128), batch_size=8
    )
    # Its noise is not used.
    config.process = dict(name="categorical", schedule=dict(name="alpha_linear"))
    config.networks = dict(
        language_model=dict(
            name="causal_transformer",
            width=128,
            num_layers=4,
            num_heads=4,
            dropout=0.1,
            unroll=True,
        )
    )
    config.objective = dict(name="language_model")
    config.optim = dict(
        language_model=dict(
            name="adam",
            learning_rate=dict(
                name="cosine", value=2e-3, warmup_steps=100, decay_steps=num_steps
            ),
            options=dict(b2=0.99),
        )
    )
    config.train = dict(num_steps=num_steps)
    config.sampler = dict(name="token_ancestral", num_steps=64)
    config.guidance = dict()
    config.checkpoint = dict(every=1000, best="held_out/loss", best_mode="min")
    config.evals.held_out.update(every=1000)
    # There is nothing to sample.
    config.logging = dict(every=100, samples_every=0)
    if variant == "smoke":
        common.shrink(config)
        config.data.source.length = 32
        config.networks.language_model.update(width=16, num_layers=1, num_heads=2)
        config.logging.samples_every = 0
    return config
