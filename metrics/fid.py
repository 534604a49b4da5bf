"""FID of batches of images, and of blocks of statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from metrics.detectors import Detector
from metrics.statistics import Statistics


class BlockFid(NamedTuple):
    """FID over all images and over disjoint blocks of them.

    The FID of a block is larger than that of all images: its bias is about 1 / (images in it).
    """

    fid: float
    blocks: tuple[float, ...]
    n: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.blocks))

    @property
    def spread(self) -> float:
        """Sample standard deviation over the blocks; 0 for a single block."""
        return float(np.std(self.blocks, ddof=1)) if len(self.blocks) > 1 else 0.0


def gather(batches: Iterable[Tensor], detector: Detector, source: str = "") -> Statistics:
    """Statistics of uint8 (B, 3, H, W) batches on this rank; ``reduce()`` sums over the ranks."""
    stats = Statistics(detector.id, source)
    for images in batches:
        stats.update(detector(images))
    return stats


def block_fid(blocks: Sequence[Statistics], reference: Statistics) -> BlockFid:
    """FID of all blocks together and of each block, against one reference.

    Raises:
        ValueError: no block, a block of fewer than two images, or another detector.
    """
    if not blocks:
        raise ValueError("no statistics were given: pass at least one block.")
    whole = blocks[0].merge(*blocks[1:])
    return BlockFid(whole.fid(reference), tuple(b.fid(reference) for b in blocks), whole.n)
