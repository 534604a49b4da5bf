"""Training images by number: image n of a run is the same in every batch and on every rank.

Everything random about it (which file, noise, noise level, flips) is a function of (seed, n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from denoisers.training.augment import DRAWS
from image_data.labelled import LabelledImages
from runtime.dist import World
from runtime.noise import Name, SeedNoise

#: Numbers in `TrainingBatch.chance` for the noise level, class dropout and augmentation.
PARTS = (1, 1, DRAWS)


class TrainingBatch(NamedTuple):
    """B images as they were read, with their classes and random numbers."""

    images: Tensor  #: uint8 (B, C, H, W)
    classes: Tensor  #: int64 (B,); zeros for a network without classes
    chance: Tensor  #: standard normal numbers (B, sum(PARTS) + C H W): ``PARTS``, then the noise


def training_batch(
    images: LabelledImages, indices: Sequence[int], numbers: Sequence[int], name: Name
) -> TrainingBatch:
    """The images at ``indices``, with the draws ``name`` of ``numbers``, one for each."""
    size = sum(PARTS) + math.prod(images.shape)
    chance = SeedNoise(numbers).normal(name, (size,))
    return TrainingBatch(images.read(indices), images.classes[list(indices)], chance)


class Order:
    """Which of ``size`` images is number n of a run: a new permutation for every epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, number: int) -> int:
        epoch, place = divmod(number, self.size)
        if epoch != self._epoch:
            keys = SeedNoise([epoch]).normal(("order", self.seed), (self.size,))[0]
            self._epoch, self._order = epoch, keys.argsort(stable=True)
        return int(self._order[place])


def shares(start: int, batch: int, world: World) -> Iterator[Sequence[int]]:
    """The numbers of this rank's images in every batch from image ``start`` on, without end."""
    return (world.shard(range(first, first + batch)) for first in count(start, batch))


class TrainingBatches(Dataset[TrainingBatch | Exception]):
    """The batches of a run by the numbers of their images."""

    def __init__(self, images: LabelledImages, seed: int) -> None:
        self.images, self.seed = images, seed
        self.order = Order(len(images), seed)

    def __getitem__(self, numbers: Sequence[int]) -> TrainingBatch | Exception:
        """The batch, or the error: raised in a worker, its traceback would hide the message."""
        try:
            indices = [self.order(number) for number in numbers]
            return training_batch(self.images, indices, numbers, ("train", self.seed))
        except (ValueError, OSError) as error:
            return error
