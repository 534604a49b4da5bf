"""Fidelity and diversity from the k-nearest-neighbour balls of a set.

Precision and recall: Kynkaanniemi et al., 2019 (arXiv 1904.06991). Density and coverage: Naeem et
al., 2020 (arXiv 2002.09797). Distances are Euclidean, in float64, computed in blocks of rows, so
memory grows linearly with the number of features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  #: rows of a block of distances
PR_NEIGHBOURS, DC_NEIGHBOURS = 3, 5


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = PR_NEIGHBOURS) -> PrecisionRecall:
    """The fraction of ``fake`` (n, d) within a ball of ``real`` (m, d), and vice versa.

    The radius of a ball is the distance to the k-th nearest neighbour in the same set; the border
    is included (eq. 1 and 2). Identical sets give 1 and 1.
    """
    real, fake = _checked(real, fake, k)
    return PrecisionRecall(_share_within(fake, real, k), _share_within(real, fake, k))


def density_coverage(real: Tensor, fake: Tensor, k: int = DC_NEIGHBOURS) -> DensityCoverage:
    """Density and coverage of ``fake`` (n, d) by the balls of ``real`` (m, d) (eq. 4, 5).

    Density is the mean number of balls that contain a ``fake`` point, divided by k, and may exceed
    1. Coverage is the fraction of balls that contain one. Borders are excluded, as in the authors'
    code, so identical sets of distinct points give exactly 1 and 1.
    """
    real, fake = _checked(real, fake, k)
    inside, covered = 0, 0
    for rows, radii in zip(_blocks(real, fake), _radii(real, k).split(ROWS), strict=True):
        within = rows < radii[:, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return DensityCoverage(inside / (k * len(fake)), covered / len(real))


def _share_within(points: Tensor, centres: Tensor, k: int) -> float:
    radii = _radii(centres, k)
    inside = sum(int((rows <= radii).any(1).sum()) for rows in _blocks(points, centres))
    return inside / len(points)


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour other than itself, (n,)."""
    return torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in _blocks(x, x)])


def _blocks(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances of ``ROWS`` points of ``a`` at a time to all of ``b``, (rows, len(b)).

    Rounding errors at points that coincide are set to zero.
    """
    squares = (b * b).sum(1)
    for rows in a.split(ROWS):
        sizes = (rows * rows).sum(1)[:, None] + squares
        distances = sizes - 2 * rows @ b.T
        yield distances.masked_fill(distances < 64 * torch.finfo(a.dtype).eps * sizes, 0.0)


def _checked(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"balls of {k} neighbours need more than {k} images of each set, got {len(real)} and "
            f"{len(fake)}: add images."
        )
    real, fake = real.double(), fake.double()
    centre = real.mean(0)  # for smaller rounding errors
    return real - centre, fake - centre
