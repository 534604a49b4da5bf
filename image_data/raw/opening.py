"""Open published images of any kind: folders, zips, CIFAR-10's tarball, and idx files (MNIST)."""

from __future__ import annotations

import tarfile
from contextlib import AbstractContextManager
from pathlib import Path

from image_data.formats import damage_of
from image_data.raw.arrays import IDX_IMAGES, IDX_LABELS, open_cifar, open_idx, unpacked
from image_data.raw.dataset import RawDataset
from image_data.raw.files import open_files
from runtime.errors import UserError


def open_raw(path: Path, split: str | None = None) -> AbstractContextManager[RawDataset]:
    """The images of ``path``; ``split`` (train, test) is only for CIFAR-10.

    Raises UserError for a path without images, and for damaged files.
    """
    kind = _kind_of(path)
    if kind == "cifar":
        return open_cifar(path, split or "train")
    if split is not None:
        raise UserError(f"{path} has no splits, only the CIFAR-10 tarball has them: omit --split")
    return open_idx(path) if kind == "idx" else open_files(path)


def _kind_of(path: Path) -> str:
    """``files``, ``idx`` or ``cifar``, by the first bytes; UserError if it is none of them."""
    if path.is_dir():
        return "files"
    if not path.exists():
        raise UserError(f"{path} does not exist: check --source")
    with damage_of(path), unpacked(path) as file:
        head = file.read(4)
    if head.startswith(b"PK"):
        return "files"
    if head == IDX_IMAGES:
        return "idx"
    with damage_of(path):
        if tarfile.is_tarfile(path):
            return "cifar"
    what = "the labels of an idx data set" if head == IDX_LABELS else "not a supported source"
    raise UserError(
        f"{path} is {what}: --source takes a folder, a zip, cifar-10-python.tar.gz, or the images "
        "of an idx data set (such as train-images-idx3-ubyte.gz)"
    )
