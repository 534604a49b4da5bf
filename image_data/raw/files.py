"""Images in folders and zips, at any depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from image_data.containers import FileContainer
from image_data.formats import CONVERTIBLE, DAMAGE, damage_of, decode
from image_data.labels import TABLE, parse_labels
from image_data.raw.dataset import BrokenImage, RawDataset, RawImage
from runtime.errors import UserError, reason

SHOWN = 10  #: class names that a message lists


@contextmanager
def open_files(path: Path) -> Iterator[RawDataset]:
    """The images in a folder or zip, sorted by name.

    Links to folders are followed, as subsets of ImageNet are often made of them.  Raises UserError
    for a damaged zip, and if there is no image.
    """
    with damage_of(path):
        container = FileContainer(path, follow_links=True)
    with container:
        seen = {name for name in container.names if not _is_hidden(name)}
        images = sorted(n for n in seen if PurePosixPath(n).suffix.lower() in CONVERTIBLE)
        if not images:
            endings = ", ".join(sorted(CONVERTIBLE))
            raise UserError(f"{path} holds no image: expected files that end in {endings}")
        if TABLE in seen:
            labels, classes = _from_table(container, images)
        else:
            labels, classes = _from_folders(images)
        items = (
            RawImage(name, labels[name] if labels else None, partial(_load, container, name))
            for name in images
        )
        yield RawDataset(path, len(images), classes, items, len(seen - {TABLE}) - len(images))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


Labels = Mapping[str, int] | None


def _from_table(container: FileContainer, images: list[str]) -> tuple[Labels, str]:
    """Classes as written by this project or by EDM's tool."""
    try:
        labels = parse_labels(container.read(TABLE))
    except DAMAGE as error:
        raise UserError(
            f'{container.path} has a {TABLE} that is not {{"labels": [[file, class], ...]}} '
            f"({reason(error)}): mend or remove it"
        ) from error
    if labels is None:
        return None, f"no classes ({TABLE} has none)"
    for name in images:
        label = labels.get(name)
        if type(label) is not int or label < 0:
            raise UserError(
                f"{name} in {container.path} has no class in {TABLE} ({label}): add it, or remove "
                f"{TABLE} to take the sub-folders as classes"
            )
    return labels, f"{len(set(labels.values()))} classes from {TABLE}"


def _from_folders(images: list[str]) -> tuple[Labels, str]:
    """Top folders, sorted, are the classes 0, 1, ...; none unless all images are in several."""
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


def _load(container: FileContainer, name: str) -> Image.Image:
    try:
        image = decode(container.read(name))
    except DAMAGE as error:
        raise BrokenImage(reason(error)) from error
    if image is None:
        raise UserError(
            f"{name} in {container.path} has more than 8 bits per channel: convert it to 8 bits "
            "first, as its white level is not known here"
        )
    return image
