"""A stream of images of any kind, with their classes; one image is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message is the reason."""


@dataclass(frozen=True)
class RawImage:
    """One image."""

    name: str
    label: int | None
    load: Callable[[], Image.Image]  #: RGB, upright; raises BrokenImage


@dataclass(frozen=True)
class RawDataset:
    """Images as they are published; ``items`` can be iterated once."""

    path: Path
    count: int
    classes: str  #: in words: how many, and where they come from
    items: Iterator[RawImage]
    left_out: int = 0  #: files without the extension of an image
