"""Arrays to pictures: numpy in, uint8 `[H, W, 3]` out, and PNG files.

Images come as `[N, H, W, C]` in [-1, 1] with one or three channels. Small images are
enlarged by repeating pixels, so that what is seen is what the model made.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

WHITE = 255
_VISIBLE = 40  # pixels: below this an image is too small to judge on a screen


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Returns images `[N, H, W, C]` in [-1, 1] as uint8 `[N, H, W, 3]`, clipped.

    Raises:
      ValueError: the shape is not that of grayscale or RGB images.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images: expected [N, H, W, 1 or 3], got shape {images.shape}."
        )
    scaled = np.nan_to_num((np.clip(images, -1, 1) + 1) * 127.5)
    return np.broadcast_to(
        np.round(scaled).astype(np.uint8), (*images.shape[:-1], 3)
    ).copy()


def shows_images(shape: Sequence[int]) -> bool:
    """Whether examples of this shape, without the batch axis, can be shown."""
    return len(shape) == 3 and shape[-1] in (1, 3)


def _enlarge(images: np.ndarray, scale: int | None) -> np.ndarray:
    """Repeats pixels `scale` times; None: until the longer side is easily visible."""
    if scale is None:
        scale = max(1, -(-_VISIBLE // max(images.shape[1:3])))
    return images.repeat(scale, 1).repeat(scale, 2)


def _tile(images: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """Lays uint8 `[N, H, W, 3]` in rows on white, `gap` pixels between and around."""
    number, height, width, _ = images.shape
    rows = -(-number // columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), WHITE, np.uint8
    )
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def grid(
    images: np.ndarray, columns: int, *, scale: int | None = None, gap: int = 2
) -> np.ndarray:
    """Returns the images in rows of `columns` as one picture, uint8 `[H', W', 3]`.

    Args:
      images: [N, H, W, C] in [-1, 1].
      columns: images per row; the last row may be shorter.
      scale: how often each pixel is repeated; None makes small images visible.
      gap: white pixels between the images.
    """
    if columns < 1:
        raise ValueError(f"columns: must be at least 1, got {columns}.")
    return _tile(_enlarge(to_uint8(images), scale), columns, gap)


def pairs(
    left: np.ndarray,
    right: np.ndarray,
    columns: int,
    *,
    caption: str = "",
    scale: int | None = None,
) -> np.ndarray:
    """Returns `left[i]` beside `right[i]`, `columns` pairs a row, under a caption."""
    both = np.stack([to_uint8(left), to_uint8(right)], 1)
    touching = np.concatenate([both[:, 0], both[:, 1]], axis=2)
    if scale is None:
        scale = max(1, -(-_VISIBLE // max(both.shape[2:4])))
    picture = _tile(_enlarge(touching, scale), columns, 8)
    return _with_margin(picture, [(8, 4, caption)], top=26) if caption else picture


def labelled_grid(
    samples: Sequence[np.ndarray],
    real: Sequence[np.ndarray],
    class_names: Sequence[str],
    *,
    captions: tuple[str, str] = ("samples", "real"),
    scale: int | None = None,
) -> np.ndarray:
    """Returns one row per class: its name, samples, and real images beside them.

    Args:
      samples: per class, [n, H, W, C] in [-1, 1]; classes may differ in n.
      real: per class, the same.
      class_names: as many names as classes.
      captions: what stands over the two halves.
      scale: how often each pixel is repeated; None makes small images visible.
    """
    if not len(samples) == len(real) == len(class_names):
        raise ValueError(
            "labelled_grid: samples, real and class_names differ in length: "
            f"{len(samples)}, {len(real)}, {len(class_names)}."
        )
    halves = []
    for rows in (samples, real):
        columns = max(1, *(len(row) for row in rows))
        shape = next(row.shape[1:] for row in rows if len(row))
        padded = np.ones((len(rows), columns, *shape), np.float32)
        for row, images in zip(padded, rows, strict=True):
            row[: len(images)] = images
        halves.append(grid(padded.reshape(-1, *shape), columns, scale=scale))
    height, divider = halves[0].shape[0], 24
    space = np.full((height, divider, 3), WHITE, np.uint8)
    picture = np.concatenate([halves[0], space, halves[1]], axis=1)
    left, top = 14 + 8 * max(len(str(name)) for name in class_names), 28
    row_height = (height - 2) / len(class_names)
    words = [
        (8, round(top + (i + 0.5) * row_height - 8), str(name))
        for i, name in enumerate(class_names)
    ]
    words.append((left + 2, 6, captions[0]))
    words.append((left + halves[0].shape[1] + divider + 2, 6, captions[1]))
    return _with_margin(picture, words, left=left, top=top)


def named_rows(rows: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Returns one row of images below the other, the name of each at its left.

    Args:
      rows: (name, images `[N, H, W, C]` in [-1, 1]) each, all of one shape.
    """
    images = np.concatenate([images for _, images in rows])
    picture = grid(images, len(rows[0][1]))
    height = (picture.shape[0] - 2) / len(rows)
    words = [
        (8, round((i + 0.5) * height - 8), name) for i, (name, _) in enumerate(rows)
    ]
    longest = max(len(name) for name, _ in rows)
    return _with_margin(picture, words, left=14 + 8 * longest)


def _with_margin(picture, words, *, left=0, top=0) -> np.ndarray:
    """Adds white at the left and the top, and writes `(x, y, text)` there."""
    from PIL import Image, ImageDraw, ImageFont

    padded = np.pad(
        picture, ((top, 0), (left, 0), (0, 0)), constant_values=np.uint8(WHITE)
    )
    image = Image.fromarray(padded)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=14)
    for x, y, text in words:
        draw.text((x, y), text, fill=(40, 44, 52), font=font)
    return np.asarray(image)


def scatter(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    size: float = 3.6,
    columns: int | None = None,
) -> np.ndarray:
    """Returns 2-D points as panels with the same axes, side by side.

    Args:
      panels: (title, points [N, 2], label [N] that gives the colour) each.
      size: width and height of a panel in inches, at 100 dots per inch.
      columns: panels a row; None is all in one.

    Raises:
      ValueError: the points are not two-dimensional.
    """
    # The object interface of matplotlib: pyplot would keep global state and figures.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for title, points, _ in panels:
        if np.ndim(points) != 2 or np.shape(points)[1] != 2:
            raise ValueError(
                f"scatter: '{title}': expected points [N, 2], got {np.shape(points)}."
            )
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(
        (size * columns, size * rows), dpi=100, layout="constrained", facecolor="white"
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    colours = np.asarray(colormaps["tab10"].colors)
    for axis, (title, points, label) in zip(axes.flat, panels, strict=False):
        axis.scatter(*points.T, s=5, alpha=0.6, lw=0, c=colours[np.asarray(label) % 10])
        axis.set_title(title, fontsize=10)
        axis.set_aspect("equal", adjustable="box")
        axis.tick_params(labelsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


_COLOURS = 10
_MARKERS = "osD^vP*X<>"
_STYLES = ("-", "--", ":", "-.")


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    x_title: str,
    y_title: str,
    levels: Sequence[tuple[str, float]] = (),
    tallest: float = 12,
) -> np.ndarray:
    """Returns curves on logarithmic axes as one picture, uint8 `[H, W, 3]`.

    Ten colours, then ten more with another marker and line: thirty curves can be told
    apart. The legend lists them from top to bottom as they end, those that end above
    the picture, which is cut off at `tallest` times the lowest value, with that word.

    Args:
      lines: (name, x, y) each; values that are not positive are left out.
      x_title, y_title: of the axes.
      levels: (name, y) of each dashed line across.
      tallest: one curve that ran away would press all others into a line.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    height = max(5.0, 1.2 + 0.2 * len(lines))
    figure = Figure((10, height), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    colours = colormaps["tab10"].colors
    drawn, ticks = [], set()
    for i, (name, x, y) in enumerate(lines):
        points = [(a, b) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
        if not points:
            continue
        ticks.update(a for a, _ in points)
        (line,) = axis.plot(
            *zip(*points, strict=True),
            color=colours[i % _COLOURS],
            marker=_MARKERS[(i + i // _COLOURS) % len(_MARKERS)],
            linestyle=_STYLES[i // _COLOURS % len(_STYLES)],
            markersize=5,
            linewidth=1.4,
            alpha=0.9,
        )
        drawn.append((points[-1][1], line, name))
    if not drawn:
        return np.full((500, 1000, 3), WHITE, np.uint8)
    drawn.sort(key=lambda entry: -entry[0])
    best = min(min(line.get_ydata()) for _, line, _ in drawn)
    for i, (name, y) in enumerate(levels):
        if y > 0:
            style = 0, (6, 3) + (1, 3) * i
            line = axis.axhline(y, color="black", linestyle=style, lw=1.2)
            drawn.append((0.0, line, name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(
        [t for t in sorted(ticks) if math.log2(t) % 1 == 0] or sorted(ticks)
    )
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    lowest = min(min(line.get_ydata()) for _, line, _ in drawn)
    low, high = max(low, 0.85 * lowest), min(high, tallest * best)
    axis.set_ylim(low, high)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.yaxis.set_minor_formatter("{x:g}" if high < 100 * low else NullFormatter())
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)
    axis.grid(True, which="both", color="0.92", lw=0.6)
    axis.set_axisbelow(True)
    axis.legend(
        [line for _, line, _ in drawn],
        [f"{name} (above)" if end > high else name for end, _, name in drawn],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        fontsize=8,
        frameon=False,
        handlelength=3.2,
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def captioned_columns(
    columns: Sequence[tuple[str, np.ndarray]], *, scale: int | None = None
) -> np.ndarray:
    """Returns images in columns, a caption over each: row i is example i throughout.

    Args:
      columns: (caption, images `[N, H, W, C]` in [-1, 1]) each, all of one shape.
      scale: how often each pixel is repeated; None fits the caption over its column.

    Raises:
      ValueError: the columns differ in shape.
    """
    shapes = {np.shape(images) for _, images in columns}
    if len(shapes) != 1:
        raise ValueError(f"captioned_columns: shapes differ: {sorted(shapes)}.")
    longest = max(len(caption) for caption, _ in columns)
    if scale is None:
        wanted = max(_VISIBLE, 9 * longest)
        scale = max(1, -(-wanted // shapes.pop()[2]))
    rows = np.stack([images for _, images in columns], 1)
    rows = rows.reshape(-1, *rows.shape[2:])
    picture = grid(rows, len(columns), scale=scale, gap=4)
    step = (picture.shape[1] - 4) // len(columns)
    words = [(6 + i * step, 5, caption) for i, (caption, _) in enumerate(columns)]
    return _with_margin(picture, words, top=24)


def visible(x: np.ndarray) -> np.ndarray:
    """Returns `[N, H, W, C]` with 1 or 3 of its channels: the first ones of latents."""
    if shows_images(x.shape[1:]):
        return x
    return x[..., : 3 if x.shape[-1] > 3 else 1]


def of_examples(x: np.ndarray, label: np.ndarray | None = None) -> np.ndarray:
    """Returns any examples as one picture, uint8 `[H, W, 3]`.

    Images are a grid, one row per class where there are labels; vectors a scatter plot
    of their first two dimensions.

    Args:
      x: `[N, H, W, C]` in [-1, 1], or `[N, D]`.
      label: `[N]`, classes.
    """
    if x.ndim == 2:
        colour = np.zeros(len(x), np.int64) if label is None else label
        return scatter([(f"{len(x)} samples", x[:, :2], colour)])
    x = visible(x)
    if label is None or len(np.unique(label)) == 1:
        return grid(x, math.ceil(math.sqrt(len(x))))
    order = np.argsort(label, kind="stable")
    return grid(x[order], int(np.bincount(label).max()))


def save_png(path: str | os.PathLike, picture: np.ndarray) -> pathlib.Path:
    """Writes uint8 `[H, W, 3]` as PNG; a reader never sees half a file.

    Raises:
      TypeError: the picture is not uint8.
    """
    from PIL import Image

    if picture.dtype != np.uint8:
        raise TypeError(f"save_png: expected uint8, got {picture.dtype}.")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    Image.fromarray(picture).save(temporary, format="PNG")
    os.replace(temporary, path)
    return path
