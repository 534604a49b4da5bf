"""Images from a folder or a zip, as uint8 batches.

Zips follow the EDM layout: image files in any sub-folder and a ``dataset.json`` with labels.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
#: Threads that decode: PIL and zlib leave the interpreter to the others while they work.
WORKERS = min(16, os.cpu_count() or 1)
#: Smaller images (pixels) have one thread: most of their time is the interpreter's, and two
#: threads that pass it to and fro take twice as long as one.
SMALL = 128 * 128
TASK = 16  #: images that a thread decodes at a time


def _is_image(name: str) -> bool:
    file = name.rpartition("/")[2]
    return os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")


def _files(folder: Path) -> list[str]:
    """All files below ``folder``, as relative names with slashes."""
    names: list[str] = []
    for place, _, files in os.walk(folder):  # ten times as fast as Path.rglob
        below = Path(place).relative_to(folder).as_posix()
        names += files if below == "." else [f"{below}/{file}" for file in files]
    return names


class ImageSource:
    """A sorted list of image files in a folder (recursively) or a zip; threads may share it.

    Raises:
        FileNotFoundError: nothing lies at ``path``.
        ValueError: ``path`` is neither a folder nor a readable zip, or holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()  # a zip has one position to read from
        self._zip: zipfile.ZipFile | None = None
        if self.path.is_dir():
            files = _files(self.path)
        elif not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist: pass a folder or a zip of images.")
        else:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as err:
                raise ValueError(
                    f"{path} is not a readable zip ({err}): pass a folder or a zip of images."
                ) from err
            files = self._zip.namelist()
        self.names = sorted(name for name in files if _is_image(name))
        if not self.names:
            raise ValueError(
                f"{path} holds no image: expected files ending in {', '.join(sorted(EXTENSIONS))}."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def _bytes(self, name: str) -> bytes:
        if self._zip is None:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read()
        with self._lock:
            return self._zip.read(name)

    def identity(self) -> str:
        """SHA-256 of where the files lie, their names, sizes and times: of a file, the zip."""
        digest, place = hashlib.sha256(), str(self.path.resolve())
        for file in [place] if self._zip else [os.path.join(place, name) for name in self.names]:
            seen = os.stat(file)
            digest.update(f"{file}\0{seen.st_size}\0{seen.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def read(self, index: int) -> np.ndarray:
        """The image as uint8 (3, H, W); a broken or non-RGB image raises ValueError."""
        name = self.names[index]
        try:
            with Image.open(io.BytesIO(self._bytes(name))) as image:
                deep = ";16" in str(image.tile)  # Pillow would cut them off without a word
                if image.mode == "RGB" and not deep:
                    return np.asarray(image).transpose(2, 0, 1)
                mode = image.mode
        except (OSError, SyntaxError, zipfile.BadZipFile, zlib.error,
                UnidentifiedImageError) as err:  # fmt: skip
            raise ValueError(
                f"image {name} in {self.path} cannot be read ({err}): replace or remove it."
            ) from err
        kind = "grayscale" if mode in {"1", "L", "LA"} else f"of mode {mode}"
        kind = "of 16 bits per channel" if deep or mode.startswith("I") else kind
        raise ValueError(
            f"image {name} in {self.path} is {kind}, expected 8-bit RGB: convert it to RGB first."
        )

    def labels(self) -> np.ndarray:
        """int64 (N,) class labels of ``dataset.json``, in the order of ``names``."""
        try:
            table = dict(json.loads(self._bytes("dataset.json"))["labels"])
            return np.array([table[name] for name in self.names], dtype=np.int64)
        except (KeyError, OSError, TypeError, ValueError) as err:
            raise ValueError(
                f"{self.path} has no label for each of its images ({err}): expected a "
                'dataset.json with {"labels": [[file, class], ...]}.'
            ) from err


def choose(count: int, num: int | None, seed: int) -> np.ndarray:
    """Sorted indices of ``num`` of ``count`` images, drawn without replacement by ``seed``."""
    if num is None or num == count:
        return np.arange(count)
    if num > count:
        raise ValueError(f"{num} images were asked for, found {count}: lower the number.")
    return np.sort(np.random.RandomState(seed % (1 << 31)).permutation(count)[:num])


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

    ``num`` images are drawn by ``seed`` before they are dealt out to the ranks, so the set of
    images does not depend on the number of ranks; the first ``start`` of them are left out.
    Threads decode the next batch while the caller is busy with this one.

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
    """Room for the images (B, 3, H, W), and the tasks that fill it."""
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
    for task in tasks:
        task.result()  # raises what went wrong there, the first image first
    return torch.from_numpy(images)
