"""Training images by number: image n of a run is the same in every batch and on every rank.

All that is random about it (which file, noise, noise level, flips) is a function of (seed, n).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from denoisers.training.augment import DRAWS
from image_data.sources import ImageSource
from runtime.dist import World
from runtime.errors import UserError
from runtime.noise import Name, SeedNoise

#: Of the numbers in ``TrainingBatch.chance``: the noise level, class dropout, augmentation.
PARTS = (1, 1, DRAWS)


class TrainingBatch(NamedTuple):
    """B images as they were read, and the chance that belongs to them."""

    images: Tensor  #: uint8 (B, C, H, W)
    classes: Tensor  #: int64 (B,); zeros where the network has none
    chance: Tensor  #: standard normal numbers (B, sum(PARTS) + C H W): ``PARTS``, then the noise


class Order:
    """Which of ``size`` images is number n of a run: a fresh permutation for every pass."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._pass, self._order = -1, torch.empty(0)

    def __call__(self, number: int) -> int:
        turn, place = divmod(number, self.size)
        if turn != self._pass:
            keys = SeedNoise([turn]).normal(("order", self.seed), (self.size,))[0]
            self._pass, self._order = turn, keys.argsort(stable=True)
        return int(self._order[place])


def shares(start: int, batch: int, world: World) -> Iterator[Sequence[int]]:
    """The numbers of this rank's images in every batch from image ``start`` on, without end."""
    return (world.shard(range(first, first + batch)) for first in count(start, batch))


class Images:
    """The images of a zip or folder, for a network of ``channels`` x ``resolution``^2 pixels.

    With ``label_dim`` classes each needs one in ``dataset.json``.  Raises UserError (or what
    :class:`image_data.sources.ImageSource` raises) where they do not fit.
    """

    def __init__(self, path: Path, channels: int, resolution: int, label_dim: int) -> None:
        self.path, self.shape = path, (channels, resolution, resolution)
        with ImageSource(path) as source:
            self.names = source.names
            self._check(0, source.read(0))
            labels = source.labels() if label_dim else np.zeros(len(source), np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= max(label_dim, 1)))
        if wrong.size:
            raise UserError(
                f"{self.names[wrong[0]]} in {path} is of class {labels[wrong[0]]}, but the network "
                f"has {label_dim} (0 to {label_dim - 1}); give it the label_dim of the images"
            )
        self.classes = torch.from_numpy(labels)
        self._source: ImageSource | None = None  # every process opens its own

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Iterable[int], numbers: Iterable[int], name: Name) -> TrainingBatch:
        """The images at ``indices``, with chance that belongs to ``numbers`` and ``name``."""
        self._source = self._source or ImageSource(self.path)
        indices = list(indices)
        images = [self._source.read(i) for i in indices]
        for index, image in zip(indices, images, strict=True):
            self._check(index, image)
        size = sum(PARTS) + int(np.prod(self.shape))
        chance = SeedNoise(list(numbers)).normal(name, (size,))
        return TrainingBatch(torch.from_numpy(np.stack(images)), self.classes[indices], chance)

    def _check(self, index: int, image: np.ndarray) -> None:
        if image.shape != self.shape:
            has, wants = ("x".join(map(str, shape)) for shape in (image.shape, self.shape))
            raise UserError(
                f"{self.names[index]} in {self.path} has {has} values where the network takes "
                f"{wants}; convert the images with python -m tools.dataset_tool, or change the "
                "network"
            )


class TrainingBatches(Dataset[TrainingBatch | Exception]):
    """The batches of a run by the numbers of their images."""

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.seed = images, seed
        self.order = Order(len(images), seed)

    def __getitem__(self, numbers: Sequence[int]) -> TrainingBatch | Exception:
        """The batch, or why there is none: raised here, a worker's traceback would hide it."""
        try:
            return self.images.batch(map(self.order, numbers), numbers, ("train", self.seed))
        except (ValueError, OSError) as error:
            return error
