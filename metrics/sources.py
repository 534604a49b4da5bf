"""Images from a folder or a zip, as uint8 batches.

Zips follow the EDM layout: image files in any sub-folder and a ``dataset.json`` with labels.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def _is_image(name: str) -> bool:
    file = PurePosixPath(name)
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


class ImageSource:
    """A sorted list of image files in a folder (recursively) or a zip.

    Raises:
        FileNotFoundError: nothing lies at ``path``.
        ValueError: ``path`` is neither a folder nor a readable zip, or holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if self.path.is_dir():
            files = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*")]
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
        return self._zip.read(name) if self._zip else (self.path / name).read_bytes()

    def read(self, index: int) -> np.ndarray:
        """The image as uint8 (3, H, W); a broken or non-RGB image raises ValueError."""
        name = self.names[index]
        try:
            with Image.open(io.BytesIO(self._bytes(name))) as image:
                if image.mode == "RGB":
                    return np.asarray(image).transpose(2, 0, 1)
                mode = image.mode
        except (OSError, SyntaxError, zipfile.BadZipFile, zlib.error,
                UnidentifiedImageError) as err:  # fmt: skip
            raise ValueError(
                f"image {name} in {self.path} cannot be read ({err}): replace or remove it."
            ) from err
        kind = "grayscale" if mode in {"1", "L", "LA"} else f"of mode {mode}"
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
) -> Iterator[Tensor]:
    """Yield uint8 (B, 3, H, W) batches of rank ``shard[0]`` of ``shard[1]``, B <= ``batch``.

    ``num`` images are drawn by ``seed`` before they are dealt out to the ranks, so the set of
    images does not depend on the number of ranks.

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
        mine = indices[rank::size]
        for start in range(0, len(mine), batch):
            images = []
            for index in mine[start : start + batch]:
                images.append(source.read(int(index)))
                if images[-1].shape != shape:
                    got, want = images[-1].shape[:0:-1], shape[:0:-1]
                    raise ValueError(
                        f"image {source.names[index]} in {path} is {got[0]}x{got[1]}, the first "
                        f"is {want[0]}x{want[1]}: bring all images to one size."
                    )
            yield torch.from_numpy(np.stack(images))
