"""Text to tokens and back: characters, bytes, or the file of a trained tokenizer.

A tokenizer here has `num_tokens`, `encode(text) -> [N]` and `decode(tokens) -> str`.
`decode(encode(text))` is the text for characters and bytes; those of a file may change
spaces, and bytes that are cut in the middle of a character become U+FFFD.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

UNKNOWN = "\ufffd"
_ACCEPTED = (
    "'characters', 'bytes', or a file: .json of Hugging Face tokenizers or .model of "
    "SentencePiece"
)
_CHUNK = 2**22  # characters that are looked up at a time


class Tokenizer(Protocol):
    """Text to tokens below `num_tokens`, and back; the same `identity`, the same."""

    num_tokens: int
    identity: str

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, tokens: np.ndarray) -> str: ...


def dtype_of(num_tokens: int) -> type:
    """Returns the smallest type of integers that holds tokens below `num_tokens`."""
    if num_tokens <= 2**8:
        return np.uint8
    return np.uint16 if num_tokens <= 2**16 else np.int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Characters:
    """Token i is character i of a sorted alphabet.

    Attributes:
      alphabet: sorted, each character once.
      has_unknown: one token more, the last, for every other character.
    """

    alphabet: str
    has_unknown: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.alphabet) + self.has_unknown

    @property
    def identity(self) -> str:
        return f"characters {_short(repr((self.alphabet, self.has_unknown)).encode())}"

    def encode(self, text: str) -> np.ndarray:
        """Returns tokens `[N]` of a text of N characters.

        Raises:
          ValueError: a character is not in the alphabet, and there is no unknown one.
        """
        parts = [
            self._encode(text[start : start + _CHUNK])
            for start in range(0, len(text), _CHUNK)
        ]
        return np.concatenate([np.zeros(0, dtype_of(self.num_tokens)), *parts])

    def _encode(self, text: str) -> np.ndarray:
        known, codes = _codes(self.alphabet), _codes(text)
        tokens = np.searchsorted(known, codes)
        strange = known[np.minimum(tokens, len(known) - 1)] != codes
        if strange.any() and not self.has_unknown:
            character = text[int(np.argmax(strange))]
            raise ValueError(
                f"text: the character {character!r} is none of the "
                f"{len(self.alphabet)} of the training text."
            )
        tokens[strange] = len(self.alphabet)
        return tokens.astype(dtype_of(self.num_tokens))

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of tokens `[N]`; U+FFFD for the unknown character."""
        symbols = self.alphabet + UNKNOWN
        return "".join(symbols[token] for token in tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """UTF-8: 256 tokens."""

    num_tokens = 256
    identity = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        return np.asarray(tokens, np.uint8).tobytes().decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromFile:
    """A tokenizer that was trained elsewhere.

    Attributes:
      num_tokens: one more than the largest token.
      identity: tells its file from others.
      to_tokens, to_text: what the library does.
    """

    num_tokens: int
    identity: str
    to_tokens: Callable[[str], list[int]]
    to_text: Callable[[list[int]], str]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.to_tokens(text), dtype_of(self.num_tokens))

    def decode(self, tokens: np.ndarray) -> str:
        return self.to_text([int(token) for token in tokens])


def of_alphabet(train: str, test: str) -> Characters:
    """Returns the characters of `train`, with an unknown one if `test` has others."""
    known = set(train)
    return Characters(
        alphabet="".join(sorted(known)), has_unknown=not known.issuperset(test)
    )


def of_file(path: str) -> FromFile:
    """Returns the tokenizer of a .json or .model file.

    Raises:
      ValueError: the word is unknown, or the file is none of a tokenizer.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: its library is not installed.
    """
    file = pathlib.Path(path)
    readers = {".json": _hugging_face, ".model": _sentence_piece}
    if file.suffix not in readers:
        raise ValueError(f"tokenizer: expected {_ACCEPTED}; got '{path}'.")
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file; tokenizer is {_ACCEPTED}.")
    return readers[file.suffix](file)


def _hugging_face(file: pathlib.Path) -> FromFile:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise _missing(file, "tokenizers") from error
    try:
        made = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # its own type is Exception
        raise ValueError(f"tokenizer: cannot read '{file}': {error}.") from error
    # A file may ask for one length of every text; ours is cut afterwards.
    made.no_truncation()
    made.no_padding()
    largest = max(made.get_vocab(with_added_tokens=True).values())
    return FromFile(
        num_tokens=largest + 1,
        identity=f"{file.suffix} {_short(file.read_bytes())}",
        to_tokens=lambda text: made.encode(text, add_special_tokens=False).ids,
        to_text=lambda tokens: made.decode(tokens, skip_special_tokens=False),
    )


def _sentence_piece(file: pathlib.Path) -> FromFile:
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise _missing(file, "sentencepiece") from error
    try:
        made = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"tokenizer: cannot read '{file}': {error}.") from error

    def to_tokens(text: str) -> list[int]:
        # Control symbols such as '</s>' are never found in a text.
        piece = made.piece_to_id(text)
        return [piece] if made.is_control(piece) else made.encode(text, out_type=int)

    return FromFile(
        num_tokens=made.get_piece_size(),
        identity=f"{file.suffix} {_short(file.read_bytes())}",
        to_tokens=to_tokens,
        to_text=made.decode,
    )


def _missing(file: pathlib.Path, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"tokenizer: '{file}' needs the package {package}: run 'pip install "
        f"{package}', or use 'characters' or 'bytes'."
    )


def _codes(text: str) -> np.ndarray:
    """The code points of a text, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
