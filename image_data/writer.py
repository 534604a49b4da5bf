"""Write a data set in EDM's layout: a zip or a folder of RGB images of one square size.

Images are ``00000/img00000000.png`` and so on; ``dataset.json`` holds their classes.
"""

from __future__ import annotations

import glob
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from PIL import Image

from image_data.labels import TABLE, format_labels
from image_data.raw.dataset import BrokenImage, RawDataset
from runtime.errors import UserError
from runtime.images import Pixels
from runtime.log import TextLog, progress
from runtime.outputs import locked

EPOCH = (1980, 1, 1, 0, 0, 0)  #: time of every file in a zip, so that equal images give equal bytes


@dataclass(frozen=True)
class SquareShape:
    """How an image is made square."""

    resolution: int | None = None  #: pixels a side; None keeps the size
    crop: bool = False  #: first cut out the middle of the longer side

    def __call__(self, image: Image.Image) -> Pixels:
        """RGB image -> uint8 (H, H, 3): cropped as in EDM's tool, then resampled by Lanczos.

        Raises ValueError for an image that is not square, unless it is cropped.
        """
        width, height = image.size
        if self.crop:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        elif width != height:
            raise ValueError(f"{width}x{height}, expected square: add --transform=center-crop")
        size = (self.resolution or image.width,) * 2
        if image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        # an array drops everything else in the file: profile, gamma, transparent colour
        return np.array(image)


@dataclass
class WrittenImages:
    """What has been written so far."""

    labels: list[int | None] = field(default_factory=list)  #: of the images written
    side: int = 0  #: pixels, the same for all of them
    skipped: int = 0
    enlarged: int = 0
    first_enlarged: str = ""


def name_of(index: int) -> str:
    """``00012/img00012345.png``: a thousand images in a folder."""
    return f"{index // 1000:05}/img{index:08}.png"


def encode(pixels: Pixels) -> bytes:
    """An uncompressed PNG: several times faster to read, and the same for any version of zlib."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


WriteFile = Callable[[str, bytes], None]


@contextmanager
def destination(dest: Path) -> Iterator[WriteFile]:
    """A function that adds a file to the zip or folder ``dest``, which appears once it is complete.

    Until then the files are in a hidden folder beside it; that of a killed process is removed when
    ``dest`` is written again.  Raises UserError if ``dest`` exists, or another process writes it.
    """
    hidden = f".{dest.name}."
    with locked(dest.with_name(f"{hidden}lock"), dest):
        if dest.exists():
            raise UserError(f"{dest} exists already: remove it, or give another --dest")
        for left in dest.parent.glob(f"{glob.escape(hidden)}*/"):
            shutil.rmtree(left)
        with _scratch(dest, hidden) as write:
            yield write


@contextmanager
def _scratch(dest: Path, hidden: str) -> Iterator[WriteFile]:
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=hidden) as scratch:
        unfinished = Path(scratch, dest.name)
        if dest.suffix.lower() == ".zip":
            with ZipFile(unfinished, "w", ZIP_STORED) as archive:
                yield lambda name, data: archive.writestr(_entry(name), data)
        else:
            yield lambda name, data: _write_file(unfinished / name, data)
        os.replace(unfinished, dest)


def _entry(name: str) -> ZipInfo:
    entry = ZipInfo(name, EPOCH)
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # a plain file, on any system
    return entry


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_dataset(
    source: RawDataset, write: WriteFile, shape: SquareShape, most: int | None, skip_broken: bool
) -> WrittenImages:
    """Write the first ``most`` images of the source that can be read, and their classes.

    Raises UserError for an image that is broken (unless these are skipped), not square, or of
    another size than the first; and if there is none that can be read.
    """
    written, say = WrittenImages(), TextLog()
    with progress(min(source.count, most or source.count), "images", "img") as bar:
        for item in source.items:
            bar.update()
            name = f"{item.name} in {source.path}"
            try:
                image = item.load()
            except BrokenImage as error:
                if not skip_broken:
                    raise UserError(
                        f"{name} cannot be read ({error}): replace it, or "
                        "pass --skip-broken to omit such images"
                    ) from error
                say(f"skipped {name}: {error}")
                written.skipped += 1
                continue
            write(name_of(len(written.labels)), encode(_shaped(image, name, shape, written)))
            written.labels.append(item.label)
            if len(written.labels) == most:
                break
    if not written.labels:
        raise UserError(f"none of the images in {source.path} can be read: fetch it again")
    classes = [label for label in written.labels if label is not None]
    names = [name_of(i) for i in range(len(written.labels))]
    write(TABLE, format_labels(names, classes if len(classes) == len(names) else None))
    return written


def _shaped(image: Image.Image, name: str, shape: SquareShape, written: WrittenImages) -> Pixels:
    """The pixels of one image, after checking its size against those before."""
    try:
        pixels = shape(image)
    except ValueError as error:
        raise UserError(f"{name} is {error}") from error
    side = len(pixels)
    if written.side not in (0, side):
        raise UserError(
            f"{name} is {side}x{side}, the images before it are {written.side}x{written.side}: "
            "add --resolution to make one size of them"
        )
    written.side = side
    if min(image.size) < side:
        written.enlarged += 1
        written.first_enlarged = written.first_enlarged or name
    return pixels
