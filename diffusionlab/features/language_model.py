"""Reference models of text: runs of this program, and GPT-2 from a local file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusionlab.features import gpt2
from diffusionlab.features.base import Room
from diffusionlab.types import Array, Source

OBJECTIVE = "language_model"


class LanguageModel(NamedTuple):
    """A causal model, and how text becomes its tokens.

    Attributes:
      params: arrays on the host, any nested dictionary.
      log_probs: `log_probs(params, tokens) -> [B, L]` float32, of each token given
        those before it, tokens `[B, L]` int32 with L at most `context`.
      first: of the scored tokens: 1 where the first follows nothing.
      context: tokens it can take at once.
      padding: a token to fill rows with; it is not scored.
      encode: `encode(texts) -> lists of integers`; None where it has no tokenizer.
      source: of a run, whose tokens are its own; None of others.
      about: JSON that says which model it is.
      end: the token that ends a text; the first that can be is scored, and no other.
    """

    params: Any
    log_probs: Callable[[Any, Array], Array]
    first: int
    context: int
    padding: int
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]] | None
    source: Source | None
    about: Mapping[str, Any]
    end: int | None = None


def check(path: str, field: str = "reference") -> None:
    """Raises where `path` names no reference model; reads no weights yet.

    Raises:
      FileNotFoundError: there is neither a run nor a file of weights.
      ValueError: the run has another objective, or the file another ending.
    """
    objective = _objective(path)
    if objective is None:
        if not pathlib.Path(path).exists():
            raise FileNotFoundError(
                f"{field}: there is no '{path}'; give a run of "
                "configs/text/language_model.py, or the folder of a GPT-2."
            )
        if pathlib.Path(path).is_dir() and not any(pathlib.Path(path).glob("*.safet*")):
            raise FileNotFoundError(
                f"{field}: '{path}' holds neither a run nor model.safetensors; give a "
                "run of configs/text/language_model.py, or the folder of a GPT-2."
            )
        _, folder = gpt2.find(path, field)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{field}: there is no {folder / 'tokenizer.json'}; it lies beside the "
                "weights at Hugging Face."
            )
    elif objective != OBJECTIVE:
        raise ValueError(
            f"{field}: the run in '{path}' has the objective '{objective}', which is "
            f"no language model; give one of '{OBJECTIVE}', or the folder of a GPT-2."
        )


def _objective(path: str) -> str | None:
    """The objective of a run directory; None where it is none."""
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        return None
    # GPT-2 from Hugging Face has a file of this name, too.
    block = json.loads(file.read_text(encoding="utf-8")).get("objective")
    return block["name"] if isinstance(block, Mapping) else None


def load(
    path: str, room: Room, step: int | None = None, field: str = "reference"
) -> LanguageModel:
    """Returns the model of a run directory, or of a GPT-2 file or its folder.

    Args:
      path: see above.
      room: opens runs.
      step: of the run's checkpoint; None is the newest.
      field: of the config that names it, for messages.

    Raises:
      FileNotFoundError, ValueError: see `check`; or it cannot be read.
    """
    check(path, field)
    if _objective(path) is None:
        if step is not None:
            raise ValueError(f"{field}_step: '{path}' is no run, so it has no steps.")
        _, folder = gpt2.find(path, field)
        encode, end = gpt2.tokenizer(folder, field)
        params, log_probs, about = gpt2.load(path, field)
        context, known = gpt2.context_length(params), gpt2.num_tokens(params)

        def known_tokens(texts: Sequence[str]) -> list:
            rows = encode(texts)
            if (largest := max((max(r, default=0) for r in rows), default=0)) >= known:
                raise ValueError(
                    f"token {largest}, and the weights have {known}: tokenizer.json "
                    "is of another model."
                )
            return rows

        return LanguageModel(
            params, log_probs, 1, context, 0, known_tokens, None, about, end
        )
    folder = pathlib.Path(path)
    try:
        params, log_probs, source, about = room.open_language_model(folder, step)
    except ValueError as error:
        ours = f"{field}_{error}" if str(error).startswith("step:") else str(error)
        raise ValueError(ours) from None
    if not source.spec.num_tokens:
        raise ValueError(f"{field}: the data of the run in '{path}' are no tokens.")
    encode = None
    if hasattr(source, "encode"):
        encode = lambda texts: [source.encode(text) for text in texts]  # noqa: E731
    context = int(np.prod(source.spec.shape))
    return LanguageModel(params, log_probs, 0, context, 0, encode, source, about)


def vocabulary(source: Source) -> list[str] | None:
    """Returns the text of every token of a source; None where it cannot say."""
    if not hasattr(source, "decode"):
        return None
    tokens = np.arange(source.spec.num_tokens, dtype=np.int32)
    return [source.decode(tokens[i : i + 1]) for i in range(len(tokens))]


def same_tokens(ours: Source, theirs: Source | None) -> bool:
    """Whether token i is the same text to both; by number where they have no text."""
    if theirs is None or ours.spec.num_tokens != theirs.spec.num_tokens:
        return False
    return vocabulary(ours) == vocabulary(theirs)


def tokens_of(
    model: LanguageModel, source: Source, x: np.ndarray, field: str = "reference"
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns tokens of `source` as the model's own, and which of them are scored.

    They are taken as they are where the vocabularies agree, and otherwise decoded to
    text and encoded again; what is longer than the context then is cut. Of the tokens
    that end a text the first counts, as in Hoogeboom et al. 2026, section 7.

    Args:
      model: the reference.
      source: of the data, with `decode` where the vocabularies differ.
      x: `[B, L]` int32.
      field: of the config, for messages.

    Returns:
      tokens `[B, C]` int32, mask `[B, C]` bool, and how many rows were cut. A row of
      too few tokens has none that is scored.

    Raises:
      ValueError: the vocabularies differ and there is no way through text; the text has
        what the model's tokenizer cannot say; or L is longer than the context.
    """
    if same_tokens(source, model.source):
        if x.shape[1] > model.context:
            raise ValueError(
                f"{field}: its context is {model.context} tokens, and the examples "
                f"have {x.shape[1]}; train one on examples of that length."
            )
        mask = np.arange(x.shape[1]) >= model.first
        return x.astype(np.int32), np.broadcast_to(mask, x.shape), 0
    if model.encode is None or not hasattr(source, "decode"):
        theirs = model.source.spec.num_tokens if model.source else "other"
        raise ValueError(
            f"{field}: has {theirs} tokens of its own, and the data "
            f"{source.spec.num_tokens}; they cannot be decoded and encoded again: give "
            "one that was trained on these tokens."
        )
    texts = [source.decode(row) for row in x]
    try:
        rows = [np.asarray(row, np.int32) for row in model.encode(texts)]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{field}: its tokenizer cannot encode the samples: {error}"
        ) from error
    if all(len(row) <= model.first for row in rows):
        raise ValueError(
            f"{field}: none of {len(rows)} examples has a token to score once it is "
            "text."
        )
    lengths = np.minimum([len(row) for row in rows], model.context)
    tokens = np.full((len(rows), lengths.max()), model.padding, np.int32)
    for row, to, length in zip(rows, tokens, lengths, strict=True):
        to[:length] = row[:length]
    places = np.arange(tokens.shape[1])
    mask = (places >= model.first) & (places < lengths[:, None])
    if model.end is not None:
        is_end = (tokens == model.end) & (places >= model.first)
        mask &= (tokens != model.end) | (np.cumsum(is_end, axis=1) == 1)
    return tokens, mask, sum(len(row) > model.context for row in rows)
