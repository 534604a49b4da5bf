"""Images in the files that CIFAR-10 and MNIST are published in.

One image is in memory at a time; of CIFAR-10, one batch of 10,000.
"""

from __future__ import annotations

import gzip
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from checkpoints.pickles.files import read
from image_data.formats import damage_of
from image_data.raw.dataset import RawDataset, RawImage
from runtime.errors import UserError

CIFAR = {
    "train": [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)],
    "test": ["cifar-10-batches-py/test_batch"],
}
CIFAR_BATCH = 10_000  #: images in each of them
IDX_IMAGES = bytes([0, 0, 8, 3])  #: start of an idx file of unsigned bytes with three axes
IDX_LABELS = bytes([0, 0, 8, 1])  #: with one axis
LONGEST_SIDE = 10_000  #: of an image in an idx file; a longer one means damage


@contextmanager
def open_cifar(path: Path, split: str) -> Iterator[RawDataset]:
    """``cifar-10-python.tar.gz`` (Krizhevsky 2009): the training or the test images."""
    with ExitStack() as stack:
        with damage_of(path):
            archive = stack.enter_context(tarfile.open(path))
            names = {member.name for member in archive.getmembers() if member.isfile()}
        for name in CIFAR[split]:
            if name not in names:
                raise UserError(
                    f"{path} holds no {name}: of tarballs --source takes cifar-10-python.tar.gz "
                    "alone, unpack others into a folder"
                )
        yield RawDataset(
            path,
            CIFAR_BATCH * len(CIFAR[split]),
            f"10 classes of CIFAR-10 ({split})",
            (item for name in CIFAR[split] for item in _cifar_items(archive, name, path)),
        )


def _cifar_items(archive: tarfile.TarFile, name: str, path: Path) -> Iterator[RawImage]:
    batch = _cifar_batch(archive, name, path)
    rows, labels = (batch.get("data"), batch.get("labels")) if type(batch) is dict else (None, None)
    if not (isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.shape[1:] == (3072,)
            and isinstance(labels, list) and len(labels) == len(rows)
            and all(type(label) is int and 0 <= label < 10 for label in labels)):  # fmt: skip
        raise UserError(f"{name} in {path} holds no images of CIFAR-10: fetch it again")
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pixels = np.ascontiguousarray(row.reshape(3, 32, 32).transpose(1, 2, 0))
        yield RawImage(f"{name}[{i}]", label, partial(Image.fromarray, pixels))


def _cifar_batch(archive: tarfile.TarFile, name: str, path: Path) -> Any:
    """A batch, which is a pickle of Python 2, read as data; nothing in it is run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "batch")
        with damage_of(path), open(file, "wb") as target:
            shutil.copyfileobj(archive.extractfile(name), target)  # type: ignore[arg-type]
        try:
            return read(file)
        except UserError as error:
            raise UserError(str(error).replace(str(file), f"{name} in {path}")) from error


@contextmanager
def open_idx(path: Path) -> Iterator[RawDataset]:
    """MNIST's format: gray images, and their labels in a file beside them."""
    with unpacked(path) as file:
        _, count, height, width = struct.unpack(">4I", _exactly(file, 16, path))
        if not (0 < height <= LONGEST_SIDE and 0 < width <= LONGEST_SIDE):
            raise UserError(f"{path} says that its images are {width}x{height}: fetch it again")
        labels, classes = _idx_labels(path, count)

        def items() -> Iterator[RawImage]:
            for i in range(count):
                gray = Image.frombytes("L", (width, height), _exactly(file, width * height, path))
                yield RawImage(
                    f"image {i}", labels[i] if labels else None, partial(gray.convert, "RGB")
                )

        yield RawDataset(path, count, classes, items())


def _idx_labels(path: Path, count: int) -> tuple[bytes | None, str]:
    """The classes in the file beside ``path``, if any, and where they come from in words."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    candidates = [path.with_name(name), path.with_name(f"{name}.gz")]
    beside = next((file for file in candidates if file.is_file()), None)
    if beside is None or path in candidates:
        return None, "no classes (there is no file of labels beside the images)"
    with unpacked(beside) as file:
        magic, labelled = struct.unpack(">4sI", _exactly(file, 8, beside))
        if magic != IDX_LABELS or labelled != count:
            raise UserError(f"{beside} does not hold the labels of the {count} images of {path}")
        labels = _exactly(file, count, beside)
    return labels, f"{len(set(labels))} classes from {beside.name}"


def _exactly(file: IO[bytes], size: int, path: Path) -> bytes:
    """The next ``size`` bytes; UserError if ``path`` ends before."""
    with damage_of(path):
        data = file.read(size)
        if len(data) != size:
            raise EOFError("it ends too early")
    return data


def unpacked(path: Path) -> IO[bytes]:
    """The file, decompressed if it is in gzip's format."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")  # type: ignore[return-value]
