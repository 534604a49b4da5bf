"""Images of a data set on disk, as uint8 batches.

Zips and folders are in EDM's layout: image files at any depth, and a ``dataset.json`` with classes.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_data.containers import FileContainer
from image_data.formats import DAMAGE, is_deep, open_image
from image_data.labels import TABLE, parse_labels
from metrics.draws import choose
from runtime.errors import reason
from runtime.files import EXTENSIONS

#: Threads for decoding: Pillow and zlib release the interpreter while they work.
WORKERS = min(16, os.cpu_count() or 1)
#: Smaller images (pixels) are decoded by one thread: most of the time is the interpreter's, and
#: two threads that contend for it take twice as long as one.
SMALL = 128 * 128
TASK = 16  #: images that a thread decodes at a time


def _is_image(name: str) -> bool:
    file = name.rpartition("/")[2]
    return os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")


class ImageSource:
    """A sorted list of image files in a folder (recursively) or a zip; threads may share it.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: ``path`` is neither a folder nor a readable zip, or holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist: pass a folder or a zip of images.")
        try:
            self._files = FileContainer(self.path)
        except DAMAGE as err:
            if isinstance(err, OSError) and err.errno is not None:
                raise
            raise ValueError(
                f"{path} is not a readable zip ({err}): pass a folder or a zip of images."
            ) from err
        self.names = sorted(name for name in self._files.names if _is_image(name))
        if not self.names:
            raise ValueError(
                f"{path} holds no image: expected files ending in {', '.join(sorted(EXTENSIONS))}."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def identity(self) -> str:
        """SHA-256 of path, sizes and times of the zip, or of every image in the folder."""
        digest, place = hashlib.sha256(), str(self.path.resolve())
        images = [os.path.join(place, name) for name in self.names]
        for file in [place] if self._files.is_zip else images:
            status = os.stat(file)
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def read(self, index: int) -> np.ndarray:
        """The image as uint8 (3, H, W); ValueError for one that is damaged or not 8-bit RGB."""
        name = self.names[index]
        try:
            with open_image(self._files.read(name)) as image:
                mode, deep = image.mode, is_deep(image)
                if mode == "RGB" and not deep:
                    return np.asarray(image).transpose(2, 0, 1)
        except DAMAGE as err:
            raise ValueError(
                f"image {name} in {self.path} cannot be read ({reason(err)}): replace or remove it."
            ) from err
        kind = "grayscale" if mode in {"1", "L", "LA"} else f"of mode {mode}"
        kind = "of more than 8 bits per channel" if deep else kind
        raise ValueError(
            f"image {name} in {self.path} is {kind}, expected 8-bit RGB: convert it to RGB first."
        )

    def labels(self) -> np.ndarray:
        """int64 (N,) class labels of ``dataset.json``, in the order of ``names``."""
        try:
            table = parse_labels(self._files.read(TABLE)) or {}
            return np.array([table[name] for name in self.names], dtype=np.int64)
        except DAMAGE as err:
            raise ValueError(
                f"{self.path} has no label for each of its images ({reason(err)}): expected a "
                f'{TABLE} with {{"labels": [[file, class], ...]}}.'
            ) from err


def count_images(path: str | Path, num: int | None = None) -> int:
    """How many images ``image_batches`` yields over all ranks."""
    with ImageSource(path) as source:
        return len(choose(len(source), num, 0))


def image_batches(
    path: str | Path,
    batch: int,
    shard: tuple[int, int] = (0, 1),
    num: int | None = None,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Tensor]:
    """Yield uint8 (B, 3, H, W) batches of rank ``shard[0]`` of ``shard[1]``, B <= ``batch``.

    ``num`` images are drawn by ``seed`` before they are distributed over the ranks, so the set of
    images does not depend on the number of ranks; the first ``start`` of them are left out.
    Threads decode the next batch while the caller uses this one.

    Raises:
        FileNotFoundError, ValueError: see ``ImageSource``; also for fewer than two images and for
            images of different sizes. Each message names the file and the remedy.
    """
    rank, size = shard
    with ImageSource(path) as source:
        indices = choose(len(source), num, seed)
        if len(indices) < 2:
            raise ValueError(
                f"{path} gives {len(indices)} image, statistics need at least 2: add images."
            )
        shape = source.read(int(indices[0])).shape
        mine = indices[start + rank :: size]
        pool = ThreadPoolExecutor(WORKERS if shape[1] * shape[2] >= SMALL else 1)
        try:
            waiting: deque[tuple[np.ndarray, list[Future]]] = deque()
            for i in range(0, len(mine), batch):
                waiting.append(_decode(source, mine[i : i + batch], shape, pool))
                if len(waiting) > 1:
                    yield _decoded(*waiting.popleft())
            while waiting:
                yield _decoded(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _decode(
    source: ImageSource, indices: np.ndarray, shape: tuple[int, ...], pool: ThreadPoolExecutor
) -> tuple[np.ndarray, list[Future]]:
    """An array for the images (B, 3, H, W), and the tasks that fill it."""
    images = np.empty((len(indices), *shape), dtype=np.uint8)

    def fill(begin: int) -> None:
        for row in range(begin, min(begin + TASK, len(indices))):
            index = int(indices[row])
            image = source.read(index)
            if image.shape != shape:
                got, want = image.shape[:0:-1], shape[:0:-1]
                raise ValueError(
                    f"image {source.names[index]} in {source.path} is {got[0]}x{got[1]}, the "
                    f"first is {want[0]}x{want[1]}: bring all images to one size."
                )
            images[row] = image

    return images, [pool.submit(fill, begin) for begin in range(0, len(indices), TASK)]


def _decoded(images: np.ndarray, tasks: list[Future]) -> Tensor:
    """The images, once all tasks are done."""
    for task in tasks:
        task.result()  # raises the error of the first image that failed
    return torch.from_numpy(images)
