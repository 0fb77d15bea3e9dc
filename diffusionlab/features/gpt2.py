"""GPT-2 from a local file, as a reference model: log-probabilities of text.

    h = tokens W_e + positions W_p                                                  (1)
    h <- h + attention(norm(h)),   h <- h + mlp(norm(h))   in every layer            (2)
    log p(token i | those before) = log softmax(norm(h_{i-1}) W_e^T)                (3)

The first token follows nothing, so it has no probability and is not scored. All is
float32. Of the logits only `_CHUNK` positions are held at a time, and a gradient makes
them, and each layer, a second time: it is the gradient in all parameters that the
Gradient Moment asks for.

Weights are a flat dictionary of the published names, the layers' stacked along a first
axis; linear maps are `[in, out]` there. All sizes come from them, but for the number of
heads, which is in config.json beside the file; without that heads are 64 wide, as in
all four published sizes.

Source: Radford et al. 2019, Language models are unsupervised multitask learners.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.features import weights

ORIGIN = "It is model.safetensors of openai-community/gpt2-large, at Hugging Face, say."
HEAD = 64
_EPSILON = 1e-5
# Other models come in files of the same names; they would be computed wrongly.
_VARIANT = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": _EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
_END = "<|endoftext|>"
_CHUNK = 128
_LAYER = "h.{}."
_LAYERS = tuple(
    f"{part}.{kind}"
    for part in (
        "ln_1",
        "attn.c_attn",
        "attn.c_proj",
        "ln_2",
        "mlp.c_fc",
        "mlp.c_proj",
    )
    for kind in ("weight", "bias")
)
_WHOLE = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")

Params = Mapping[str, jax.Array]


def find(path: str, field: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the file of weights that `path` is or holds, and the folder it lies in.

    Raises:
      FileNotFoundError, ValueError: there is none; see `weights.check_file`.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    weights.check_file(str(file), field, ORIGIN)
    return file, file.parent


def convert(arrays: Mapping[str, np.ndarray], field: str) -> dict[str, np.ndarray]:
    """Returns the parameters of `log_probs` from the arrays of a published file.

    Raises:
      ValueError: they are not those of GPT-2; names what is missing or misshapen.
    """
    start = "transformer."
    arrays = {name.removeprefix(start): array for name, array in arrays.items()}

    def take(name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"{field}: not a file of GPT-2: '{name}' is missing.")
        array = np.asarray(arrays[name], np.float32)
        if shape is not None and array.shape != shape:
            raise ValueError(
                f"{field}: not a file of GPT-2: '{name}' has shape {array.shape}, and "
                f"not {shape}."
            )
        return array

    width = take("wte.weight").shape[-1]
    take("wpe.weight", (len(take("wpe.weight")), width))
    params = {name: take(name) for name in _WHOLE}
    depth = 0
    while f"{_LAYER.format(depth)}ln_1.weight" in arrays:
        depth += 1
    shapes = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for name in _LAYERS:
        part, _, kind = name.rpartition(".")
        shape = shapes.get(part, (width, width))
        shape = shape if kind == "weight" and part in shapes else shape[-1:]
        rows = [take(_LAYER.format(i) + name, shape) for i in range(max(depth, 1))]
        params[f"layers.{name}"] = np.stack(rows)
    return params


def load(path: str, field: str) -> tuple[dict[str, np.ndarray], Callable, dict]:
    """Returns (params, `log_probs(params, tokens)`, about) of a file or its folder.

    Raises:
      FileNotFoundError, ValueError: see `find` and `convert`; or the width is no
        multiple of the number of heads, or config.json is of another architecture.
    """
    file, folder = find(path, field)
    arrays, digest = weights.read(str(file), field, ORIGIN)
    params = convert(arrays, field)
    width = params["wte.weight"].shape[1]
    heads = width // HEAD
    config = folder / "config.json"
    if config.is_file():
        said = json.loads(config.read_text(encoding="utf-8"))
        heads = int(said.get("n_head", heads))
        for name, ours in _VARIANT.items():
            if said.get(name, ours) != ours:
                raise ValueError(
                    f"{field}: config.json beside it has {name} = {said[name]!r}, and "
                    f"this is GPT-2 with {ours!r}."
                )
    if heads < 1 or width % heads:
        raise ValueError(
            f"{field}: the width {width} of this GPT-2 is no multiple of {HEAD}, the "
            "width of a head; give n_head in config.json beside it."
        )
    about = {"network": "GPT-2", "weights": digest, "heads": heads}
    return params, functools.partial(log_probs, heads=heads), about


def tokenizer(
    folder: pathlib.Path, field: str
) -> tuple[Callable[[list[str]], list], int | None]:
    """Reads tokenizer.json in a folder.

    Returns:
      `encode(texts) -> lists of integers`, and the token that ends a text, if any.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the package `tokenizers` is missing, or cannot read the file.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{field}: there is no {file}; it lies beside the weights at Hugging Face."
        )
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{field}: {file} needs the package 'tokenizers'; pip install tokenizers."
        ) from None
    try:
        found = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{field}: {file} cannot be read: {error}.") from None
    # A file may ask for one length of every text; what fills it up would be scored.
    found.no_truncation()
    found.no_padding()

    def encode(texts: list[str]) -> list:
        return [one.ids for one in found.encode_batch(texts, add_special_tokens=False)]

    return encode, found.token_to_id(_END)


def num_tokens(params: Params) -> int:
    """Returns how many tokens it knows."""
    return params["wte.weight"].shape[0]


def context_length(params: Params) -> int:
    """Returns how many tokens there are positions for."""
    return params["wpe.weight"].shape[0]


def log_probs(params: Params, tokens: jax.Array, *, heads: int) -> jax.Array:
    """Returns log p of each token given those before it, `[B, L]` float32: equation 3.

    Args:
      params: from `convert`.
      tokens: `[B, L]` int32, L at most `context_length`. The entry of the first token
        is 0: it is not scored.
      heads: of the attention.

    Raises:
      ValueError: L is more than there are positions for.
    """
    if tokens.shape[1] > context_length(params):
        raise ValueError(
            f"tokens: {tokens.shape[1]} of them, and this GPT-2 has "
            f"{context_length(params)} positions."
        )
    # Left to itself an accelerator multiplies float32 with fewer bits.
    with jax.default_matmul_precision("float32"):
        found = _scores(params, _hidden(params, tokens[:, :-1], heads), tokens[:, 1:])
    return jnp.pad(found, ((0, 0), (1, 0)))


def _norm(h: jax.Array, params: Params, name: str) -> jax.Array:
    mean = jnp.mean(h, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(h - mean), axis=-1, keepdims=True)
    normal = (h - mean) * jax.lax.rsqrt(variance + _EPSILON)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def _linear(h: jax.Array, params: Params, name: str) -> jax.Array:
    return h @ params[f"{name}.weight"] + params[f"{name}.bias"]


def _hidden(params: Params, tokens: jax.Array, heads: int) -> jax.Array:
    """Returns norm(h) after the last layer, `[B, L, D]`: equations 1 and 2."""
    batch, length = tokens.shape
    h = params["wte.weight"][tokens] + params["wpe.weight"][:length]

    @jax.checkpoint
    def layer(h, params):
        qkv = _linear(_norm(h, params, "ln_1"), params, "attn.c_attn")
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h = h + _linear(y.reshape(h.shape), params, "attn.c_proj")
        up = _linear(_norm(h, params, "ln_2"), params, "mlp.c_fc")
        return h + _linear(jax.nn.gelu(up, approximate=True), params, "mlp.c_proj")

    start = "layers."
    layers = {
        k.removeprefix(start): v for k, v in params.items() if k.startswith(start)
    }
    h, _ = jax.lax.scan(lambda h, one: (layer(h, one), None), h, layers)
    return _norm(h, params, "ln_f")


def _scores(params: Params, h: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns log p of `targets` `[B, L]` from h `[B, L, D]`, in chunks of L."""
    vocabulary, (batch, length, width) = params["wte.weight"], h.shape
    chunk = min(_CHUNK, max(length, 1))
    rest = -length % chunk
    h = jnp.pad(h, ((0, 0), (0, rest), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, rest)))
    h = h.reshape(batch, -1, chunk, width).swapaxes(0, 1)
    targets = targets.reshape(batch, -1, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def score(h, targets):
        logits = h @ vocabulary.T
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    found = jax.lax.map(lambda both: score(*both), (h, targets))
    return found.swapaxes(0, 1).reshape(batch, -1)[:, :length]
