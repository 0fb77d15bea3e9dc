"""Samples of tokens as text: what pictures are for images."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from diffusionlab.types import DataSpec, Source


def shows_text(spec: DataSpec) -> bool:
    """Whether samples are tokens, which are written as text and not drawn."""
    return spec.num_tokens > 0


def of_tokens(source: Source, x: np.ndarray) -> list[str]:
    """Returns each of the tokens `[N, ...]` as text; the numbers where it has none.

    Args:
      source: of the data; one of text has `decode(tokens [L]) -> str`.
      x: integers.
    """
    if hasattr(source, "decode") and x.ndim == 2:
        return [source.decode(tokens) for tokens in x]
    return [" ".join(map(str, tokens.ravel())) for tokens in x]


def blocks(said: Sequence[str], label: np.ndarray | None = None) -> str:
    """Returns one block per text, '[index]' or '[index] label' above each.

    Args:
      said: the texts.
      label: `[N]`, classes.
    """
    heads = [f"[{i}]" for i in range(len(said))]
    if label is not None:
        heads = [f"{head} {label[i]}" for i, head in enumerate(heads)]
    pairs = zip(heads, said, strict=True)
    return "\n\n".join(f"{head}\n{text}" for head, text in pairs) + "\n"


def over_steps(rows: Sequence[tuple[int, Sequence[str]]], limit: int = 240) -> str:
    """Returns the texts of one sample below each other, step by step, for each sample.

    Args:
      rows: (step, texts of the same samples).
      limit: characters of a text that are kept; it stands in one line.
    """
    lines = []
    for i in range(min(len(said) for _, said in rows)):
        lines.append(f"[{i}]")
        for step, said in rows:
            line = said[i][:limit].replace("\r", " ").replace("\n", "\u21b5")
            lines.append(f"{f'step {step:,}':>14}  {line}")
        lines.append("")
    return "\n".join(lines)


def save(path: str | os.PathLike, text: str) -> pathlib.Path:
    """Writes UTF-8; a reader never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)
    return path
