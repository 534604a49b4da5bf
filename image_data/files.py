"""Streams of images out of folders and zips, for ``dataset_tool.py``.

A source knows the names of its images and their classes, and holds one image at a time.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from PIL import Image, ImageOps

from runtime.errors import UserError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  #: nothing else is tried on a file
TABLE = "dataset.json"
SHOWN = 10  #: class names that a message repeats
#: What decoding a broken file may raise.
DAMAGE = (
    ArithmeticError, BadZipFile, EOFError, LookupError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, tarfile.TarError, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class Broken(ValueError):
    """An image that cannot be decoded, and why: the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    label: int | None
    load: Callable[[], Image.Image]  #: RGB, upright; raises Broken


@dataclass(frozen=True)
class Source:
    """A stream of images; ``items`` can be gone through once."""

    path: Path
    count: int
    classes: str  #: in words: how many, and where they come from
    items: Iterator[Item]
    left_out: int = 0  #: files that do not end like an image


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Say that ``path`` is damaged, where reading it fails; not where the system refuses it."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} cannot be read ({_reason(error)}): fetch it again") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # without the path, which is said already
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def open_folder(path: Path) -> Iterator[Source]:
    """Images anywhere below a folder."""
    names = [name.relative_to(path).as_posix() for name in _walk(path)]
    yield _of_files(path, names, lambda name: (path / name).read_bytes())


def _walk(path: Path) -> Iterator[Path]:
    """All files; links to folders are followed, as a part of ImageNet is often made of them."""

    def stop(error: OSError) -> None:
        raise error

    for folder, _, files in os.walk(path, onerror=stop, followlinks=True):
        yield from (Path(folder, file) for file in files)


@contextmanager
def open_zip(path: Path) -> Iterator[Source]:
    """Images anywhere in a zip."""
    with damage_of(path):
        archive = ZipFile(path)
    with archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        yield _of_files(path, names, archive.read)


def _of_files(path: Path, names: Iterable[str], contents: Callable[[str], bytes]) -> Source:
    """The images among ``names``, sorted."""
    seen = {name for name in names if not any(p.startswith(".") for p in name.split("/"))}
    images = sorted(n for n in seen if PurePosixPath(n).suffix.lower() in EXTENSIONS)
    if not images:
        raise UserError(
            f"{path} holds no image: expected files that end in {', '.join(sorted(EXTENSIONS))}"
        )
    if TABLE in seen:
        labels, classes = _from_table(path, images, contents)
    else:
        labels, classes = _from_folders(images)
    items = (
        Item(name, labels[name] if labels else None, partial(_load, path, name, contents))
        for name in images
    )
    return Source(path, len(images), classes, items, len(seen - {TABLE}) - len(images))


Labels = Mapping[str, int] | None


def _from_table(
    path: Path, images: list[str], contents: Callable[[str], bytes]
) -> tuple[Labels, str]:
    """Classes that an earlier run of this tool, or of EDM's, wrote down."""
    try:
        rows = json.loads(contents(TABLE))["labels"]
        labels = None if rows is None else {name: label for name, label in rows}
    except DAMAGE as error:
        raise UserError(
            f'{path} has a {TABLE} that is not {{"labels": [[file, class], ...]}} '
            f"({_reason(error)}): mend or remove it"
        ) from error
    if labels is None:
        return None, f"no classes ({TABLE} has none)"
    for name in images:
        label = labels.get(name)
        if type(label) is not int or label < 0:
            raise UserError(
                f"{name} in {path} has no class in {TABLE} ({label}): add it, or remove {TABLE} to "
                "take the sub-folders as classes"
            )
    return labels, f"{len(set(labels.values()))} classes from {TABLE}"


def _from_folders(images: list[str]) -> tuple[Labels, str]:
    """Top folders, sorted, are the classes 0, 1, ... if there are several and nothing beside."""
    tops = [name.split("/")[0] if "/" in name else None for name in images]
    folders = sorted({top for top in tops if top is not None})
    if len(folders) < 2 or None in tops:
        return None, "no classes (the images do not lie in several sub-folders)"
    number = {folder: i for i, folder in enumerate(folders)}
    text = [f"{i} {folder}" for i, folder in enumerate(folders)]
    if len(text) > SHOWN:
        text[SHOWN - 1 : -1] = ["..."]
    labels = {n: number[top] for n, top in zip(images, tops, strict=True) if top is not None}
    return labels, f"{len(folders)} classes by sub-folder: {', '.join(text)}"


def _load(path: Path, name: str, contents: Callable[[str], bytes]) -> Image.Image:
    try:
        image = decode(contents(name))
    except DAMAGE as error:
        raise Broken(_reason(error)) from error
    if image is None:
        raise UserError(
            f"{name} in {path} has more than 8 bits per channel: make 8-bit images of these first, "
            "as what is white in them is not known here"
        )
    return image


def decode(data: bytes) -> Image.Image | None:
    """An image file (the first frame of several) as RGB, turned as its EXIF orientation says.

    Gray, palette and CMYK images become RGB by Pillow's rules, without colour profiles; alpha is
    composited over white. None for more than 8 bits per channel, of which Pillow drops the lower
    8 without a word where there are several channels.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        deep = image.format in ("PNG", "TIFF") and ";16" in str(image.tile)
        if deep or image.mode.startswith(("I", "F")):
            return None
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
