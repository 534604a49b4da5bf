"""Conversion of tensors to image files, and grids of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, isfinite, uint8

from runtime.files import atomic_write

Pixels = npt.NDArray[np.uint8]
FONT_SIZE = 11
MARGIN = 3  #: pixels around a label


def to_uint8(x: Tensor) -> Pixels:
    """Convert images in [-1, 1], (B, C, H, W), to bytes (B, H, W, C), as image files have them.

    Values and errors are those of `to_uint8_tensor`.
    """
    pixels: Pixels = to_uint8_tensor(x).permute(0, 2, 3, 1).numpy()
    return pixels


def to_uint8_tensor(x: Tensor) -> Tensor:
    """Convert images in [-1, 1], (B, C, H, W), to bytes on the CPU, as detectors take them.

    ``clip(x * 127.5 + 128, 0, 255)``, rounded down, as in the published samplers (EDM,
    ``generate.py``), so that FID values are comparable.

    Raises:
        ValueError: a value is not finite (it would silently become a black pixel).
    """
    if not bool(isfinite(x).all()):
        bad = [b for b, image in enumerate(x) if not bool(isfinite(image).all())]
        raise ValueError(
            f"image {bad[0]} of the batch is not finite ({len(bad)} of {len(x)} are not): "
            "if one step of Euler gives a finite image, the sampler diverges, so use more steps, a "
            "smaller guidance rate or a dtype of higher precision; else check the weights"
        )
    scaled = (x.detach() if x.dtype.itemsize >= 4 else x.detach().float()) * 127.5 + 128
    return scaled.clip(0, 255).to(uint8).cpu()


def read_png(path: Path) -> Pixels:
    """An image as (H, W, C), with 1 or 3 channels."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def save_png(path: str | Path, image: Pixels) -> None:
    """Write one image (H, W, C) with 1 or 3 channels as PNG, atomically."""
    with atomic_write(path) as temporary:
        _picture(image).save(temporary, format="PNG")


def image_grid(
    images: Sequence[Pixels] | Pixels,
    columns: int,
    labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    font_size: int = FONT_SIZE,
) -> Pixels:
    """Arrange images (H, W, C) of one size in rows of ``columns``; returns (H', W', C).

    ``labels`` are column headings (rotated where a column is too narrow), ``row_labels`` are to
    the left of the rows. Cells without an image are white.

    Raises:
        ValueError: no images, or the number of labels is not that of the columns or rows.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"a grid of {len(images)} images in {columns} columns: give at least one")
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    for name, texts, count in (("columns", labels, columns), ("rows", row_labels, rows)):
        if texts is not None and len(texts) != count:
            raise ValueError(f"{len(texts)} labels for {count} {name}: give one for each")
    cells = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    cells[: len(images)] = images
    cells = cells.reshape(rows, columns, height, width, channels)
    grid: Pixels = cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    tops = [_text(label, font_size) for label in labels or ()]
    sides = [_text(label, font_size) for label in row_labels or ()]
    return _with_labels(grid, tops, sides, width, height)


def film_strip(trajectory: Tensor) -> Pixels:
    """A trajectory (T, B, C, H, W) as one image: a row per sample, a column per time."""
    times, samples = trajectory.shape[:2]
    frames = to_uint8(trajectory.transpose(0, 1).flatten(0, 1))
    return image_grid(frames, columns=times) if samples else frames


def _with_labels(
    grid: Pixels, tops: list[Image.Image], sides: list[Image.Image], width: int, height: int
) -> Pixels:
    tops = [top if top.width <= width else top.rotate(90, expand=True) for top in tops]
    if not tops and not sides:
        return grid
    above = max((top.height for top in tops), default=0)
    left = max((side.width for side in sides), default=0)
    picture = _picture(grid)
    page = Image.new(picture.mode, (left + picture.width, above + picture.height), "white")
    page.paste(picture, (left, above))
    for column, top in enumerate(tops):
        page.paste(top, (left + column * width + (width - top.width) // 2, above - top.height))
    for row, side in enumerate(sides):
        page.paste(side, (left - side.width, above + row * height + (height - side.height) // 2))
    return np.asarray(page).reshape(page.height, page.width, grid.shape[2])


def _text(label: str, font_size: int) -> Image.Image:
    font: Any = ImageFont.load_default(font_size)
    left, top, right, bottom = font.getbbox(label)
    size = (round(right - left) + 2 * MARGIN, round(bottom - top) + 2 * MARGIN)
    picture = Image.new("L", size, 255)
    ImageDraw.Draw(picture).text((MARGIN - left, MARGIN - top), label, font=font, fill=0)
    return picture


def _picture(image: Pixels) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
