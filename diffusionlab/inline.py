"""Pictures and texts inside of a page, so that nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import pathlib


def text(path: pathlib.Path, limit: int) -> str:
    """Returns the first `limit` characters of a file as a preformatted block."""
    with path.open(encoding="utf-8", errors="replace") as file:
        said = file.read(limit)
        more = "\n\u2026" if file.read(1) else ""
    return f"<pre>{html.escape(said)}{more}</pre>"


def picture(path: pathlib.Path, budget: int, width: int = 1200) -> str:
    """Returns a picture as a data URI.

    Args:
      path: of a PNG file.
      budget: bytes, before base64; a larger file becomes a smaller JPEG.
      width: where that begins, in pixels.
    """
    from PIL import Image

    content, kind = path.read_bytes(), "png"
    while len(content) > budget and width > 100:
        image = Image.open(path).convert("RGB")
        image.thumbnail((width, width))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        content, kind, width = buffer.getvalue(), "jpeg", round(width * 0.7)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
