"""Text as windows of one stream of tokens, from files or from Python's own help."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zlib

import numpy as np

from diffusionlab import types
from diffusionlab.data import base, tokenizers

CORPORA = ("pydoc",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Windows of `length` tokens, `x` int32 `[length]`, of one long stream.

    The stream is all documents in sorted order, `separator` between them, encoded. Its
    last `test_fraction` is held out, in windows that do not overlap; windows of the
    rest start at every `stride`-th token. A window may cross from one document to the
    next. No window reaches from one split into the other.

    Attributes:
      corpus: 'pydoc', the topics of Python's help: 465,048 characters, 103 of them
        distinct, in Python 3.11.7, and about as many in others. '' is that of `path`.
      path: a UTF-8 file, or a folder of such files, at any depth.
      suffix: of the files of a folder.
      tokenizer: 'characters' (those of the training text, sorted, and one for all
        others if the held-out text has any), 'bytes', or a .json file of Hugging Face
        tokenizers or .model file of SentencePiece.
      length: tokens of an example.
      stride: tokens between the starts of training windows. The order of an epoch has
        as many entries as there are windows, so take more for a large text.
      separator: text between two documents; such as a symbol of the tokenizer's file.
      split: 'train' or 'test'.
      test_fraction: of the tokens.

    Raises:
      ValueError: a field out of range, a file that is not UTF-8, too little text.
      FileNotFoundError: there is no such file or folder, or none of this suffix.
      ModuleNotFoundError: the tokenizer's library is not installed.
    """

    corpus: str = ""
    path: str = ""
    suffix: str = ".txt"
    tokenizer: str = "characters"
    length: int = 128
    stride: int = 1
    separator: str = "\n"
    split: str = "train"
    test_fraction: float = 0.1

    def __post_init__(self):
        base.check_split(self.split)
        base.check_fraction(self.test_fraction)
        for name in ("length", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: must be at least 1, got {getattr(self, name)}."
                )
        if bool(self.corpus) == bool(self.path):
            raise ValueError(
                f"corpus, path: give one of them; corpora: {', '.join(CORPORA)}."
            )
        if self.corpus and self.corpus not in CORPORA:
            raise ValueError(
                f"corpus: unknown '{self.corpus}'; known: {', '.join(CORPORA)}."
            )
        found = _files(pathlib.Path(self.path), self.suffix) if self.path else ()
        stream, tokenizer = _encoded(
            tuple(map(_stamp, found)),
            self.tokenizer,
            _stamp(pathlib.Path(self.tokenizer)),
            self.separator,
            self.test_fraction,
        )
        part = _part(len(stream), self.test_fraction, self.split)
        if len(stream[part]) < self.length:
            raise ValueError(
                f"length: split '{self.split}' has {len(stream[part])} tokens, too few "
                f"for one example of {self.length}."
            )
        object.__setattr__(self, "_tokens", stream[part])
        object.__setattr__(self, "_tokenizer", tokenizer)

    @property
    def spec(self) -> types.DataSpec:
        return types.DataSpec((self.length,), num_tokens=self._tokenizer.num_tokens)

    @property
    def tokens(self) -> np.ndarray:
        """The stream of this split, `[N]`, read-only integers."""
        return self._tokens

    @property
    def vocabulary(self) -> str:
        """Tells tokenizers apart: where it is the same, tokens mean the same."""
        return self._tokenizer.identity

    @property
    def version(self) -> str:
        """Changes with the tokens of the split."""
        return base.short_hash((self.vocabulary, zlib.crc32(self._tokens)))

    def encode(self, text: str) -> np.ndarray:
        """Returns tokens int32 `[N]`; ValueError for a character that has none."""
        return self._tokenizer.encode(text).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of tokens `[N]`."""
        return self._tokenizer.decode(np.asarray(tokens))

    @property
    def _stride(self) -> int:
        return self.stride if self.split == "train" else self.length

    def __len__(self) -> int:
        return (len(self._tokens) - self.length) // self._stride + 1

    def __getitem__(self, index: int) -> base.Example:
        return {"x": self.__getitems__([index])["x"][0]}

    def __getitems__(self, indices) -> base.Example:
        indices = np.asarray(indices)
        if np.any((indices < 0) | (indices >= len(self))):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {indices}.")
        at = indices[:, None] * self._stride + np.arange(self.length)
        return {"x": self._tokens[at].astype(np.int32)}


def _part(num: int, test_fraction: float, split: str) -> slice:
    """Where a split lies in a stream of `num` tokens."""
    line = num - round(num * test_fraction)
    return slice(line, None) if split == "test" else slice(line)


def _files(path: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """The file itself, or those of a folder, sorted by their path below it."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; path is UTF-8 text, or a folder of it."
        )
    inside = [
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob(f"*{suffix}")
        if file.is_file()
    ]
    found = [f for name, f in sorted(inside) if "/." not in f"/{name}"]
    if not found:
        raise FileNotFoundError(f"{path}: has no file that ends in '{suffix}'.")
    return found


def _stamp(file: pathlib.Path) -> tuple[str, int, int]:
    """The file as it is now; a changed one has another stamp."""
    if not file.is_file():
        return str(file), 0, 0
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


def _documents(files: list[str]) -> list[str]:
    """The text of every file; of Python's help where there are none."""
    if not files:
        from pydoc_data import topics

        return [topics.topics[name] for name in sorted(topics.topics)]
    documents = []
    for file in files:
        content = pathlib.Path(file).read_bytes()
        try:
            documents.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"path: '{file}' is not UTF-8: byte {content[error.start]:#04x} at "
                f"{error.start}."
            ) from None
    return documents


# The two splits of a run are built one after the other from the same text.
@functools.lru_cache(maxsize=1)
def _encoded(
    stamps: tuple, tokenizer: str, stamp: tuple, separator: str, test_fraction: float
) -> tuple[np.ndarray, tokenizers.Tokenizer]:
    """Returns the whole stream and its tokenizer."""
    documents = _documents([name for name, *_ in stamps])
    if tokenizer == "characters":
        text = separator.join(documents)
        train, test = (
            text[_part(len(text), test_fraction, split)] for split in ("train", "test")
        )
        if not train:
            raise ValueError("path: there is no text to train on.")
        made = tokenizers.of_alphabet(train, test)
        stream = made.encode(text)
    elif tokenizer == "bytes":
        made = tokenizers.Bytes()
        stream = made.encode(separator.join(documents))
    else:
        made = tokenizers.of_file(tokenizer)
        between = made.encode(separator) if separator else made.encode("")
        parts = [p for d in documents for p in (between, made.encode(d))]
        stream = np.concatenate(parts[1:])
    stream = np.asarray(stream, tokenizers.dtype_of(made.num_tokens))
    stream.flags.writeable = False
    return stream, made
