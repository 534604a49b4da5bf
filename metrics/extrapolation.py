"""FID freed of the bias of small N: FID-infinity (Chong & Forsyth, 2020, arXiv 1911.07023).

FID is biased upwards by about c / N, c depending on the images; so FIDs of subsets lie on a line
over 1 / N, whose value at 0 is that of infinitely many images. The bias that the reference's own N
makes stays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from metrics.statistics import Statistics

MOST = 5  #: sizes of subsets: 15 Frechet distances, as many as published
LEAST = 2  #: images per feature in the smallest subsets; below that the line bends


class Infinity(NamedTuple):
    """The line: its value at 1 / N = 0, its slope, and the sizes it was fitted to."""

    fid: float
    slope: float
    sizes: tuple[int, ...]
    fids: tuple[float, ...]


def fid_infinity(features: Tensor, reference: Statistics, seed: int = 0) -> Infinity:
    """Fit a line to the FID of K features (K, d) cut into 1, 2, ... disjoint subsets, over 1 / N.

    Each size counts with the mean over its subsets, which hold all images between them, so that
    less is left to chance than with one subset of each size, as published. Subsets are drawn by
    ``seed``. There are as many sizes as leave `LEAST` images per feature, at most `MOST`.

    Raises:
        ValueError: too few images for two sizes.
    """
    images, dim = features.shape
    most = min(MOST, images // (LEAST * dim))
    if most < 2:
        raise ValueError(
            f"FID-infinity in {dim} features takes {2 * LEAST * dim} images or more, got "
            f"{images}: give more images, or --features {2 * LEAST * dim}."
        )
    shuffled = features[np.random.RandomState(seed % (1 << 31)).permutation(images)]
    cuts = range(1, most + 1)
    fids = [
        float(np.mean([_fid(part, reference) for part in shuffled.tensor_split(count)]))
        for count in cuts
    ]
    slope, fid = np.polyfit([count / images for count in cuts], fids, 1)
    sizes = tuple(images // count for count in cuts)
    return Infinity(float(fid), float(slope), sizes, tuple(fids))


def _fid(features: Tensor, reference: Statistics) -> float:
    part = Statistics(reference.detector)
    part.update(features)
    return part.fid(reference)
