"""FID without the bias of small N: FID-infinity (Chong & Forsyth, 2020, arXiv 1911.07023).

FID has a bias of about c / N, where c depends on the images, so FIDs of subsets lie on a line over
1 / N whose value at 0 is that of infinitely many images. The bias due to the N of the reference
remains.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from metrics.statistics import Statistics

MAX_SIZES = 5  #: sizes of subsets: 15 Frechet distances, as many as published
MIN_PER_FEATURE = 2  #: images per feature in the smallest subsets; with fewer it is not a line


class Infinity(NamedTuple):
    """The fitted line: its value at 1 / N = 0, its slope, and the sizes and FIDs of the fit."""

    fid: float
    slope: float
    sizes: tuple[int, ...]
    fids: tuple[float, ...]


def fid_infinity(features: Tensor, reference: Statistics, seed: int = 0) -> Infinity:
    """Fit a line over 1 / N to the FIDs of K features (K, d) split into 1, 2, ... subsets.

    The FID of a size is the mean over its disjoint subsets, which together contain all images.
    This has less variance than the published single subset per size. Subsets are drawn by
    ``seed``. Sizes leave at least `MIN_PER_FEATURE` images per feature; there are at most
    `MAX_SIZES`.

    Raises:
        ValueError: too few images for two sizes.
    """
    images, dim = features.shape
    needed = 2 * MIN_PER_FEATURE * dim
    if images < needed:
        raise ValueError(
            f"FID-infinity in {dim} features needs {needed} images or more, got {images}: give "
            f"more images, or --features {needed}."
        )
    shuffled = features[np.random.RandomState(seed % (1 << 31)).permutation(images)]
    counts = range(1, min(MAX_SIZES, images // (MIN_PER_FEATURE * dim)) + 1)
    fids = [
        float(np.mean([_fid(part, reference) for part in shuffled.tensor_split(count)]))
        for count in counts
    ]
    slope, fid = np.polyfit([count / images for count in counts], fids, 1)
    sizes = tuple(images // count for count in counts)
    return Infinity(float(fid), float(slope), sizes, tuple(fids))


def _fid(features: Tensor, reference: Statistics) -> float:
    part = Statistics(reference.detector)
    part.update(features)
    return part.fid(reference)
