"""The plane in which a sampling trajectory nearly lies.

The AMED paper (arXiv:2312.00094, section 3.1) rests on it: by the mean value theorem one direction
in that plane would be enough for a whole interval.  Each trajectory has its own plane, spanned by
the two largest principal components of its points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plane(NamedTuple):
    """Two principal axes of one trajectory, the first roughly from its start to its end."""

    center: Tensor  #: (D,) float64, the mean of the points
    axes: Tensor  #: (2, D), orthonormal
    explained: tuple[float, float]  #: shares of the variance along each axis
    off: float  #: largest distance of a point from the plane, over that of the end from the start

    @property
    def rest(self) -> float:
        """The second axis' share of the variance that the first leaves; 1 where it leaves none."""
        left = 1 - self.explained[0]
        return self.explained[1] / left if left > 1e-12 else 1.0

    def project(self, states: Tensor) -> Tensor:
        """(T, C, H, W) -> (T, 2), coordinates in the plane."""
        return (_flat(states) - self.center) @ self.axes.T


def fit_plane(states: Tensor) -> Plane:
    """The plane of one trajectory's states (T, C, H, W), T of 3 or more.

    Signs are fixed: the end lies to the right of the start, and the trajectory bulges upwards.
    """
    points = _flat(states)
    if len(points) < 3:
        raise ValueError(f"{len(points)} states do not span a plane: give 3 or more")
    center = points.mean(0)
    _, sizes, axes = torch.linalg.svd(points - center, full_matrices=False)
    share = sizes.square() / sizes.square().sum()
    flat = (points - center) @ axes[:2].T
    bulge = flat[len(flat) // 2, 1] - (flat[0, 1] + flat[-1, 1]) / 2
    signs = torch.stack([flat[-1, 0] - flat[0, 0], bulge]).sign()
    signs[signs == 0] = 1
    off = (points - center - flat @ axes[:2]).norm(dim=1).max()
    length = (points[-1] - points[0]).norm()
    explained = float(share[0]), float(share[1])
    return Plane(center, signs[:, None] * axes[:2], explained, float(off / length))


def _flat(states: Tensor) -> Tensor:
    return states.flatten(1).double().cpu()
