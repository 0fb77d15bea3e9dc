"""A transformer that predicts each token from those before it: a language model.

Source: Radford et al. 2019, GPT-2, with positions by Su et al. 2021 (arXiv 2104.09864).
"""

from flax import linen as nn
from jax import numpy as jnp

from diffusionlab.models import layers, tokens
from diffusionlab.types import Array, Cond, DataSpec, Process


class CausalTransformer(nn.Module):
    """Tokens `[B, ...]` -> logits `[B, ..., K]` of each token given those before it.

    It sees the tokens shifted by one, after a start symbol: the first answer is that of
    no token at all. Tokens on a grid come row by row. It sees no noise level and no
    class. Logits start at 0. With cond['target'], tokens `[B, ...]`, it answers their
    log-probability, `[B, ...]`: usually the tokens themselves.

    Attributes:
      process: says how many tokens there are, and is not used otherwise.
      width: of a position.
      num_layers, num_heads, mlp_ratio: of the transformer.
      dropout: on the hidden layer of each MLP.
      chunk: positions that are scored at a time; see `tokens.Head`.
      unroll: unroll the scan over layers.
      remat: name of a policy in `jax.checkpoint_policies`, or '' to keep activations.

    Raises:
      ValueError: sizes that do not fit, or a process without tokens.
    """

    spec: DataSpec
    dtype: str
    process: Process
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    chunk: int = 0
    unroll: bool = False
    remat: str = ""

    PARAM_AXES = tokens.PARAM_AXES
    sees_tokens = True
    scores_targets = True
    is_causal = True

    def __post_init__(self):
        super().__post_init__()
        tokens.check("causal_transformer", self)

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        batch, shape = z.shape[0], z.shape[1:]
        num_tokens, flat = self.process.num_tokens, z.reshape(batch, -1)
        start = jnp.full((batch, 1), num_tokens, flat.dtype)
        shifted = jnp.concatenate([start, flat[:, :-1]], axis=1)
        h = nn.Embed(num_tokens + 1, self.width, dtype=self.dtype, name="table")(
            shifted
        )
        if len(shape) > 1:
            position = self.param(
                "position", nn.initializers.normal(0.02), (h.shape[1], self.width)
            )
            h = h + position.astype(h.dtype)
        angles = layers.rotary_angles(
            tokens.places(shape), self.width // self.num_heads
        )
        h = layers.Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.unroll,
            self.remat,
            self.dtype,
            causal=True,
            name="transformer",
        )(
            layers.shard(h, "batch", "length", "embed"),
            None,
            train=train,
            angles=angles,
        )
        self.sow("intermediates", "features", h.mean(axis=1))
        h = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h)
        head = tokens.Head(num_tokens, self.chunk, self.dtype, name="head")
        answer = head(h, tokens.target_of(cond, batch))
        return answer.reshape(batch, *shape, *answer.shape[2:])
