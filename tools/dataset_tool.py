"""Convert a published image data set to EDM's layout.

The result is a zip (or a folder) of square RGB images of one size, named ``00000/img00000000.png``
and so on, and a ``dataset.json`` with their classes: the layout that the other tools and EDM's own
training code read.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import click
import numpy as np
from PIL import Image

from image_data import arrays as image_arrays
from image_data import files as image_files
from image_data.files import EXTENSIONS, TABLE, Broken, Source, damage_of
from runtime import cli
from runtime.errors import UserError
from runtime.images import Pixels
from runtime.log import TextLog, progress

PATH = click.Path(path_type=Path)
EPOCH = (1980, 1, 1, 0, 0, 0)  #: time stamp of every zip entry: equal images give an equal zip
EXAMPLES = """\b
Examples:
  python -m tools.dataset_tool --source cifar-10-python.tar.gz --dest data/cifar10-32x32-train.zip
  python -m tools.dataset_tool --source cifar-10-python.tar.gz --split test \\
      --dest data/cifar10-32x32-test.zip
  python -m tools.dataset_tool --source imagenet/train --dest data/imagenet-64x64.zip \\
      --resolution 64 --transform center-crop
  python -m tools.dataset_tool --source train-images-idx3-ubyte.gz --dest data/mnist-32x32.zip \\
      --resolution 32
"""


def open_source(path: Path, split: str | None = None) -> AbstractContextManager[Source]:
    """Open the images of ``path``, of any supported kind; ``split`` is train or test of CIFAR-10.

    Raises UserError for a path that is not a supported source.
    """
    kind = _kind_of(path)
    if kind is image_arrays.open_cifar:
        return image_arrays.open_cifar(path, split or "train")
    if split is not None:
        raise UserError(f"{path} has no splits, only the CIFAR-10 tarball has them: omit --split")
    return kind(path)


def _kind_of(path: Path) -> Callable[..., AbstractContextManager[Source]]:
    if path.is_dir():
        return image_files.open_folder
    if not path.exists():
        raise UserError(f"{path} does not exist: check --source")
    with damage_of(path), image_arrays.unpacked(path) as file:
        head = file.read(4)
    if head.startswith(b"PK"):
        return image_files.open_zip
    if head == image_arrays.IDX_IMAGES:
        return image_arrays.open_idx
    with damage_of(path):
        if tarfile.is_tarfile(path):
            return image_arrays.open_cifar
    kind_of = "the labels of an idx data set"
    what = kind_of if head == image_arrays.IDX_LABELS else "not a supported source"
    raise UserError(
        f"{path} is {what}: --source takes a folder, a zip, cifar-10-python.tar.gz, or the images "
        "of an idx data set (such as train-images-idx3-ubyte.gz)"
    )


@dataclass(frozen=True)
class Shape:
    """How an image is brought to the square size that all images share."""

    resolution: int | None = None  #: pixels per side; None keeps the size
    crop: bool = False  #: crop to the central square first

    def __call__(self, image: Image.Image) -> Pixels:
        """RGB image -> uint8 (H, H, 3): cropped as in EDM's tool, then resampled by Lanczos.

        Raises ValueError for an image that is not square, unless ``crop`` is set.
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
        # a bare array drops the file's colour profile, gamma and transparent colour
        return np.array(image)


@dataclass
class Tally:
    """Counts of what has been converted so far."""

    labels: list[int | None] = field(default_factory=list)  #: of the images written
    side: int = 0  #: pixels per side of all of them
    skipped: int = 0
    enlarged: int = 0
    first_enlarged: str = ""


def name_of(index: int) -> str:
    """``00012/img00012345.png``: a thousand images per folder."""
    return f"{index // 1000:05}/img{index:08}.png"


def encode(pixels: Pixels) -> bytes:
    """An uncompressed PNG: several times faster to read, and independent of the zlib version."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


Write = Callable[[str, bytes], None]


@contextmanager
def destination(dest: Path) -> Iterator[Write]:
    """Yield a function that adds a file to the zip or folder ``dest``.

    ``dest`` appears only when everything has been written.  Until then the files are in a hidden
    folder beside it, which is removed unless the process is killed.
    """
    if dest.exists():
        raise UserError(f"{dest} exists already: remove it, or give another --dest")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as scratch:
        made = Path(scratch, dest.name)
        if dest.suffix.lower() == ".zip":
            with ZipFile(made, "w", ZIP_STORED) as archive:
                yield lambda name, data: archive.writestr(_entry(name), data)
        else:
            yield lambda name, data: _write_file(made / name, data)
        os.replace(made, dest)


def _entry(name: str) -> ZipInfo:
    entry = ZipInfo(name, EPOCH)
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # a regular file, on any system
    return entry


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def convert(
    source: Source, write: Write, shape: Shape, most: int | None, skip_broken: bool
) -> Tally:
    """Write the first ``most`` readable images of the source, and their classes.

    Raises UserError, naming the image, for one that is broken (unless ``skip_broken``), not square,
    or of another size than the first; and for a source without readable images.
    """
    tally, say = Tally(), TextLog()
    with progress(min(source.count, most or source.count), "images", "img") as bar:
        for item in source.items:
            bar.update()
            name = f"{item.name} in {source.path}"
            try:
                image = item.load()
            except Broken as error:
                if not skip_broken:
                    raise UserError(
                        f"{name} cannot be read ({error}): replace it, or "
                        "pass --skip-broken to omit such images"
                    ) from error
                say(f"skipped {name}: {error}")
                tally.skipped += 1
                continue
            write(name_of(len(tally.labels)), encode(_shaped(image, name, shape, tally)))
            tally.labels.append(item.label)
            if len(tally.labels) == most:
                break
    if not tally.labels:
        raise UserError(f"none of the images in {source.path} can be read: download it again")
    classes = None if None in tally.labels else tally.labels
    labels = None if classes is None else [[name_of(i), c] for i, c in enumerate(classes)]
    write(TABLE, json.dumps({"labels": labels}).encode())
    return tally


def _shaped(image: Image.Image, name: str, shape: Shape, tally: Tally) -> Pixels:
    try:
        pixels = shape(image)
    except ValueError as error:
        raise UserError(f"{name} is {error}") from error
    side = len(pixels)
    if tally.side not in (0, side):
        raise UserError(
            f"{name} is {side}x{side}, the images before it are {tally.side}x{tally.side}: add "
            "--resolution to resize all of them"
        )
    tally.side = side
    if min(image.size) < side:
        tally.enlarged += 1
        tally.first_enlarged = tally.first_enlarged or name
    return pixels


def report(dest: Path, source: Source, tally: Tally) -> None:
    """Print what was written, and what was skipped, enlarged or left out."""
    size = f"{tally.side}x{tally.side}"
    click.echo(f"wrote {dest}: {len(tally.labels)} images of {size}, {source.classes}")
    if tally.skipped:
        click.echo(f"skipped because they cannot be read: {tally.skipped}")
    if tally.enlarged:
        click.echo(f"enlarged to {size}: {tally.enlarged}, first {tally.first_enlarged}")
    if source.left_out:
        endings = ", ".join(sorted(EXTENSIONS))
        click.echo(f"left out because they do not end in {endings}: {source.left_out}")


def parse_resolution(_context: object, _option: object, text: str | None) -> int | None:
    """``64`` or ``64x64``."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x\1)?", text)
    if not found:
        raise click.BadParameter(f"'{text}' is not a square size: give it as 64 or 64x64")
    return int(found[1])


@click.command(context_settings={"show_default": True}, epilog=EXAMPLES)
@click.option(
    "--source", type=PATH, required=True, help="folder, zip, CIFAR-10 tarball, or idx file"
)
@click.option("--dest", type=PATH, required=True, help="NAME.zip or a folder")
@click.option(
    "--resolution", callback=parse_resolution, metavar="N", help="64 or 64x64  [default: keep]"
)
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop"]),
    default="none",
    help="before resizing",
)
@click.option("--max-images", type=click.IntRange(1), help="use the first N  [default: all]")
@click.option("--skip-broken", is_flag=True, help="omit images that cannot be read")
@click.option("--split", type=click.Choice(["train", "test"]), help="of CIFAR-10  [default: train]")
def main(
    source: Path, dest: Path, resolution: int | None, transform: str, max_images: int | None,
    skip_broken: bool, split: str | None,
) -> None:  # fmt: skip
    """Convert a published image data set to EDM's layout.

    --source is a folder or a zip of images, cifar-10-python.tar.gz, or the images of an idx data
    set such as MNIST.  Classes are taken from its dataset.json, or else from its top-level
    sub-folders in sorted order.  --dest appears only when it is complete.
    """
    shape = Shape(resolution, crop=transform == "center-crop")
    with open_source(source, split) as images, destination(dest) as write:
        tally = convert(images, write, shape, max_images, skip_broken)
    report(dest, images, tally)


if __name__ == "__main__":
    cli.run(main)
