"""Text that samples are to contain: --prompt and --infill of mode sample.

A prompt is what every sample begins with. A file to fill in is a text in which each
blank, by default '_', is one token that is to be found; what comes after its end is to
be found as well. Around the blanks each piece of text is made tokens of by itself.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from diffusionlab import checks
from diffusionlab.samplers.fixed import Fixed
from diffusionlab.types import Sampler

# Of each step under uniform noise, see `samplers/fixed.py`.
UNIFORM_REPEATS = 4


class Given(NamedTuple):
    """A text of which all but the blanks is given.

    Attributes:
      flag: where it came from: 'prompt' or 'infill'.
      text: as the user wrote it.
      blank: the character to be filled in; '' where there is none.
    """

    flag: str
    text: str
    blank: str

    @property
    def digest(self) -> str:
        """Eight hex digits that tell it from others."""
        return hashlib.sha256("\0".join(self).encode()).hexdigest()[:8]


def read(
    prompt: str | None,
    infill: pathlib.Path | None,
    blank: str = "_",
    mode: str = "sample",
) -> Given | None:
    """Returns what --prompt, --infill and --blank say; None where nothing is given.

    The line end at the end of a file is not part of its text.

    Raises:
      ValueError: both are given, one is empty, the blank is no one character, or the
        mode draws no samples to a file.
      FileNotFoundError: there is no such file.
    """
    if prompt is None and infill is None:
        return None
    if mode != "sample":
        flag = "infill" if prompt is None else "prompt"
        raise ValueError(f"--{flag}: goes with --mode=sample, got --mode={mode}.")
    if prompt is not None and infill is not None:
        raise ValueError("--prompt: goes without --infill; take one of them.")
    if prompt is not None:
        if not prompt:
            raise ValueError("--prompt: is empty; leave it out.")
        return Given("prompt", prompt, "")
    if len(blank) != 1:
        raise ValueError(f"--blank: expected one character, got '{blank}'.")
    if not infill.is_file():
        raise FileNotFoundError(f"--infill: there is no file '{infill}'.")
    try:
        text = infill.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--infill: '{infill}' is no UTF-8 text.") from None
    text = text.removesuffix("\n")
    if not text:
        raise ValueError(f"--infill: '{infill}' is empty.")
    return Given("infill", text, blank)


def tokens_of(given: Given, source: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens, int32 `[length]`, and which of them are known, bool.

    Args:
      given: a text with blanks.
      source: of text: `encode(text) -> tokens`.
      length: of one example.

    Raises:
      ValueError: the text has more tokens than one example, or some that are none.
    """
    pieces = [given.text]
    if given.blank:
        pieces = re.split(f"({re.escape(given.blank)})", given.text)
    tokens, known = [], []
    for piece in filter(None, pieces):
        if piece == given.blank:
            tokens.append([0])
            known.append([False])
            continue
        try:
            tokens.append(source.encode(piece))
        except ValueError as error:
            said = str(error).removeprefix("text: ")
            raise ValueError(f"--{given.flag}: {said}") from None
        known.append(np.ones(len(tokens[-1]), bool))
    tokens, known = np.concatenate(tokens), np.concatenate(known)
    if len(tokens) > length:
        raise ValueError(
            f"--{given.flag}: has {len(tokens)} tokens, and samples {length}."
        )
    rest = (0, length - len(tokens))
    return np.pad(tokens, rest).astype(np.int32), np.pad(known, rest)


def sampler(experiment: Any, given: Given | None) -> Sampler:
    """Returns the sampler of an experiment, with what is given where it belongs.

    Raises:
      ValueError: the data are no text, or the text does not fit them.
    """
    if given is None:
        return experiment.sampler
    source, spec = experiment.train_source, experiment.spec
    if not hasattr(source, "encode") or len(spec.shape) != 1:
        name = experiment.config["data"]["source"]["name"]
        raise ValueError(f"--{given.flag}: is for text, and the data are '{name}'.")
    tokens, known = tokens_of(given, source, spec.shape[0])
    masked = getattr(experiment.process, "is_masked", True)
    found = Fixed(
        sampler=experiment.sampler,
        tokens=tokens,
        known=known,
        repeats=1 if masked else UNIFORM_REPEATS,
    )
    checks.check_sampler(found, experiment, f"--{given.flag}")
    return found
