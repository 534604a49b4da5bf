"""Make a data set in EDM's layout of images as they are published.

The result is a zip (or a folder) of RGB images of one square size, ``00000/img00000000.png`` and so
on, and ``dataset.json`` with their classes, as the other tools here and EDM's training take it.
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

EPOCH = (1980, 1, 1, 0, 0, 0)  #: of every file in the zip, so that equal images give equal bytes
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
    """The images of ``path``, whatever kind of source it is; ``split`` (train, test) of CIFAR-10.

    Raises UserError for a path that is none, with what is wrong in it and what to do.
    """
    kind = _kind_of(path)
    if kind is image_arrays.open_cifar:
        return image_arrays.open_cifar(path, split or "train")
    if split is not None:
        raise UserError(f"{path} has no splits, only the CIFAR-10 tarball has: leave out --split")
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
    what = "the labels of an idx data set" if head == image_arrays.IDX_LABELS else "none of these"
    raise UserError(
        f"{path} is {what}: --source takes a folder, a zip, cifar-10-python.tar.gz, or the images "
        "of an idx data set (such as train-images-idx3-ubyte.gz)"
    )


@dataclass(frozen=True)
class Shape:
    """What becomes of an image: all are made one square size."""

    resolution: int | None = None  #: pixels a side; None leaves the size as it is
    crop: bool = False  #: cut the middle of the longer side out first

    def __call__(self, image: Image.Image) -> Pixels:
        """RGB image -> uint8 (H, H, 3): cropped as in EDM's tool, then resampled by Lanczos.

        Raises ValueError for an image that is not square where nothing is cropped.
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
        # a bare array leaves behind what else the file held: profile, gamma, transparent colour
        return np.array(image)


@dataclass
class Tally:
    """What has been done so far."""

    labels: list[int | None] = field(default_factory=list)  #: of the images that were written
    side: int = 0  #: pixels, of all of them
    skipped: int = 0
    enlarged: int = 0
    first_enlarged: str = ""


def name_of(index: int) -> str:
    """``00012/img00012345.png``: a thousand images in a folder."""
    return f"{index // 1000:05}/img{index:08}.png"


def encode(pixels: Pixels) -> bytes:
    """A PNG that is not compressed: it is read several times faster, and equal for any zlib."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


Write = Callable[[str, bytes], None]


@contextmanager
def destination(dest: Path) -> Iterator[Write]:
    """A function that adds a file to the zip or folder ``dest``, which appears when all is well.

    Until then everything lies in a hidden folder beside it, which only a kill leaves behind.
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
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # a plain file, on any system
    return entry


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def convert(
    source: Source, write: Write, shape: Shape, most: int | None, skip_broken: bool
) -> Tally:
    """Write the first ``most`` images of the source that can be read, and their classes.

    Raises UserError, with its name, for an image that is broken (if such are not to be skipped),
    not square, or of another size than the first; and where no image is left.
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
                        "pass --skip-broken to leave out such images"
                    ) from error
                say(f"skipped {name}: {error}")
                tally.skipped += 1
                continue
            write(name_of(len(tally.labels)), encode(_shaped(image, name, shape, tally)))
            tally.labels.append(item.label)
            if len(tally.labels) == most:
                break
    if not tally.labels:
        raise UserError(f"none of the images in {source.path} can be read: fetch it again")
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
            "--resolution to make one size of them"
        )
    tally.side = side
    if min(image.size) < side:
        tally.enlarged += 1
        tally.first_enlarged = tally.first_enlarged or name
    return pixels


def report(dest: Path, source: Source, tally: Tally) -> None:
    """Say what there is now, and all that a person may not have expected."""
    size = f"{tally.side}x{tally.side}"
    click.echo(f"wrote {dest}: {len(tally.labels)} images of {size}, {source.classes}")
    if tally.skipped:
        click.echo(f"skipped, as they cannot be read: {tally.skipped}")
    if tally.enlarged:
        click.echo(f"enlarged to {size}: {tally.enlarged}, first {tally.first_enlarged}")
    if source.left_out:
        endings = ", ".join(sorted(EXTENSIONS))
        click.echo(f"left out, as they do not end in {endings}: {source.left_out}")


def parse_resolution(_context: object, _option: object, text: str | None) -> int | None:
    """``64`` or ``64x64``."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x\1)?", text)
    if not found:
        raise click.BadParameter(f"'{text}' is no square size: give it as 64 or 64x64")
    return int(found[1])


@click.command(context_settings={"show_default": True}, epilog=EXAMPLES)
@click.option("--source", type=click.Path(path_type=Path), required=True, help="see above")
@click.option("--dest", type=click.Path(path_type=Path), required=True, help="NAME.zip or a folder")
@click.option("--resolution", callback=parse_resolution, metavar="N", help="64 or 64x64  [kept]")
@click.option("--transform", type=click.Choice(["none", "center-crop"]), default="none")
@click.option("--max-images", type=click.IntRange(min=1), help="take the first of them  [all]")
@click.option("--skip-broken", is_flag=True, help="leave out images that cannot be read")
@click.option("--split", type=click.Choice(["train", "test"]), help="of CIFAR-10  [train]")
def main(
    source: Path, dest: Path, resolution: int | None, transform: str, max_images: int | None,
    skip_broken: bool, split: str | None,
) -> None:  # fmt: skip
    """Make a data set in EDM's layout of images as they are published.

    --source is a folder or a zip of images, cifar-10-python.tar.gz, or the images of an idx data
    set (MNIST). Classes are those of its dataset.json, else its top sub-folders in sorted order.
    --dest is there when it is complete, or not at all.
    """
    shape = Shape(resolution, crop=transform == "center-crop")
    with open_source(source, split) as images, destination(dest) as write:
        tally = convert(images, write, shape, max_images, skip_broken)
    report(dest, images, tally)


if __name__ == "__main__":
    cli.run(main)
