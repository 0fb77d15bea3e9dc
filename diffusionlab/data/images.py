"""Decoding and resizing image files with Pillow."""

from __future__ import annotations

import contextlib
import struct
import typing
import zlib
from collections.abc import Iterator

import numpy as np

if typing.TYPE_CHECKING:
    from PIL import Image


def resize(image: Image.Image, size: int) -> Image.Image:
    """Returns the central square of an image, scaled to `size` pixels.

    Averages over areas when it shrinks, and is bicubic when it grows.
    """
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    shrinks = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    box = (left, top, left + side, top + side)
    return image.resize((size, size), shrinks, box=box)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turns what Pillow raises on damaged files into a ValueError with the path."""
    from PIL import Image

    try:
        yield
    # What the decoders let through, besides Pillow's own errors.
    except (
        Image.DecompressionBombError,
        EOFError,
        IndexError,
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
    ) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def read(path: str, size: int) -> np.ndarray:
    """Returns the central square of an image file, uint8 `[size, size, 3]`.

    Raises:
      ValueError: the file is no image that Pillow can decode; has the path.
    """
    from PIL import Image, ImageOps

    with _naming(path), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(resize(upright, size))


def check(path: str) -> None:
    """Raises ValueError where an image file is damaged or cut short.

    Decoding does not see all of this (checksums of PNG), and checking does not see all
    that decoding does (JPEG), so both are done.
    """
    from PIL import Image

    with _naming(path):
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.load()


def resize_array(x: np.ndarray, size: int) -> np.ndarray:
    """Returns `resize` of a uint8 array `[H, W, C]` of 1, 3 or 4 channels."""
    from PIL import Image

    gray = x.shape[-1] == 1
    image = Image.fromarray(x[:, :, 0] if gray else x)
    return np.asarray(resize(image, size)).reshape(size, size, x.shape[-1])
