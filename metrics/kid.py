"""Kernel Inception distance (Binkowski et al., 2018, arXiv 1801.01401)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000


class Kid(NamedTuple):
    """Mean and standard deviation over the subsets (0 for a single one)."""

    mean: float
    spread: float
    subsets: int
    size: int


def mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under ``k(a, b) = (a.b / d + 1)^3``, in float64.

    The means over pairs within a set exclude pairs of an image with itself (Gretton et al., 2012,
    eq. 3). Two samples of one distribution therefore give 0 on average, and may give a value
    below 0; identical sets do.

    Args:
        x, y: features (m, d) and (n, d), m, n >= 2.
    """
    x, y = x.double(), y.double()
    m, n, d = len(x), len(y), x.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    def within(a: Tensor) -> Tensor:
        diagonal = ((a * a).sum(1) / d + 1) ** 3
        return (kernel(a, a).sum() - diagonal.sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).sum() / (m * n))


def kid(
    x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Kid:
    """The mean of ``mmd2`` over subsets drawn from each set without replacement, as published.

    A subset has ``size`` images, or as many as the smaller set. If both sets have no more than
    that, there is one subset.

    Raises:
        ValueError: a set of fewer than two features.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"KID needs 2 or more images of each set, got {len(x)} and {len(y)}: add images."
        )
    size = min(size, len(x), len(y))
    subsets = 1 if len(x) == len(y) == size else subsets
    random = np.random.RandomState(seed % (1 << 31))

    def draw(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.permutation(len(features))[:size])]

    values = [mmd2(draw(x), draw(y)) for _ in range(subsets)]
    spread = float(np.std(values, ddof=1)) if subsets > 1 else 0.0
    return Kid(float(np.mean(values)), spread, subsets, size)
