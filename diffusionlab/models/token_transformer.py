"""A transformer that sees all tokens and answers logits for each: for diffusion.

Source: the blocks of Peebles & Xie (2022), arXiv 2212.09748, on tokens, with queries
and keys normalised and turned by their positions, as Sahoo et al. 2024, MDLM
(arXiv 2406.07524) and Shi et al. 2024, MD4 (arXiv 2406.04329) have them; the input
noise is that of Hoogeboom et al. 2026 (arXiv 2603.20155), section 4.
"""

from flax import linen as nn
from jax import numpy as jnp

from diffusionlab.models import layers, tokens
from diffusionlab.types import Array, Cond, DataSpec, Process


class TokenTransformer(nn.Module):
    """Symbols `[B, ...]` -> logits `[B, ..., K]` of the clean tokens.

    Text is `[B, L]`. Of tokens on a grid, such as pixels `[B, H, W, C]`, positions turn
    the features axis by axis, and a learned vector tells the place itself. Logits start
    at 0. Without a noise level, classes and conditions the blocks have no modulation.

    cond may have besides what `layers.Embedding` reads:

      target: `[B, ...]` tokens; the answer is their log-probability, `[B, ...]`.
      noise: `[B, ..., noise_input]` numbers; zeros where they are not given.

    Attributes:
      process: says how many tokens and symbols there are.
      width: of a position.
      num_layers, num_heads, mlp_ratio: of the transformer.
      dropout: on the hidden layer of each MLP.
      time_conditioning: whether it sees the noise level. The best answer under masks
        does not depend on it, under uniform noise it does.
      chunk: positions that are scored at a time; see `tokens.Head`.
      noise_input: channels of cond['noise']. What they add starts at zero: a network
        with noise is the same as before.
      unroll: unroll the scan over layers.
      remat: name of a policy in `jax.checkpoint_policies`, or '' to keep activations.
      conditions: names of further numbers it is told; see `layers.Embedding`.

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
    time_conditioning: bool = True
    chunk: int = 0
    noise_input: int = 0
    unroll: bool = False
    remat: str = ""
    conditions: tuple[str, ...] = ()

    PARAM_AXES = (*tokens.PARAM_AXES, (r"modulation/kernel$", ("embed", "mlp")))
    sees_tokens = True
    scores_targets = True

    def __post_init__(self):
        super().__post_init__()
        tokens.check("token_transformer", self)
        if self.noise_input < 0:
            raise ValueError(
                f"noise_input: must be at least 0, got {self.noise_input}."
            )

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        batch, shape = z.shape[0], z.shape[1:]
        emb = self._embedding(cond)
        table = nn.Embed(
            self.process.num_symbols, self.width, dtype=self.dtype, name="table"
        )
        h = table(z.reshape(batch, -1))
        length, places = h.shape[1], tokens.places(shape)
        if len(shape) > 1:
            position = self.param(
                "position", nn.initializers.normal(0.02), (length, self.width)
            )
            h = h + position.astype(h.dtype)
        h = h + self._noise(cond, batch, length)
        h = layers.shard(h, "batch", "length", "embed")
        h = layers.Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.unroll,
            self.remat,
            self.dtype,
            name="transformer",
        )(
            h,
            emb,
            train=train,
            angles=layers.rotary_angles(places, self.width // self.num_heads),
        )
        self.sow("intermediates", "features", h.mean(axis=1))
        h = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h)
        if emb is not None:
            modulation = nn.Dense(
                2 * self.width,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name="modulation",
            )(emb)
            modulation = layers.shard(modulation, "batch", None)[:, None, :]
            h = h * (1 + modulation[..., self.width :]) + modulation[..., : self.width]
        head = tokens.Head(self.process.num_tokens, self.chunk, self.dtype, name="head")
        answer = head(h, tokens.target_of(cond, batch))
        return answer.reshape(batch, *shape, *answer.shape[2:])

    def _embedding(self, cond: Cond) -> Array | None:
        told = self.time_conditioning or self.spec.num_classes or self.conditions
        if not told:
            return None
        return layers.Embedding(
            self.spec,
            self.width,
            self.dtype,
            self.conditions,
            self.time_conditioning,
            name="embedding",
        )(cond)

    def _noise(self, cond: Cond, batch: int, length: int) -> Array | float:
        if not self.noise_input:
            return 0.0
        noise = cond.get("noise", jnp.zeros((batch, length, self.noise_input)))
        project = nn.Dense(
            self.width,
            use_bias=False,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="noise",
        )
        return project(noise.reshape(batch, length, -1).astype(self.dtype))
