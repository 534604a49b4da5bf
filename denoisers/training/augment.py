"""Non-leaky augmentation of training images (Karras et al. 2022, arXiv:2206.00364, appendix F.2).

The network is conditioned on 9 labels that describe the transformation of an image; samples have
labels of zero, those of an unchanged image, so that transformations do not leak into them.  The
transformations, their strengths and their labels are the published ones, except that images are
resampled by bicubic interpolation instead of the published wavelet filter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = 9  #: ``augment_dim`` of a network conditioned on them
DRAWS = 12  #: random numbers per image
OCTAVES = 0.2  #: standard deviation of log2 of a scale
SHIFT = 1 / 8  #: standard deviation of a translation, in image widths


class Change(NamedTuple):
    """Transformations of B images, applied in this order: (B,) tensors; 0 is the identity."""

    mirror: Tensor  #: 1: flip horizontally
    upend: Tensor  #: 1: flip vertically
    scale: Tensor  #: scale by 2^(OCTAVES scale)
    angle: Tensor  #: rotate counter-clockwise, in radians
    stretch: Tensor  #: scale by 2^(OCTAVES stretch) along ``axis``, by its inverse across it
    axis: Tensor  #: counter-clockwise from the horizontal, in radians
    right: Tensor  #: translate, in units of SHIFT image widths
    down: Tensor

    @classmethod
    def draw(cls, z: Tensor, p: float, mirror: bool) -> Change:
        """From standard normal numbers ``z`` (B, DRAWS).

        Each transformation is applied with probability ``p``, except the flips: horizontal ones
        have probability 1/2 if ``mirror`` is set, else 0, and vertical ones p/2.
        """
        u = torch.special.ndtr(z)
        turn = (2 * u - 1) * math.pi
        chosen = (u < p).to(z.dtype)
        return cls(
            mirror=(u[:, 0] < 0.5 * mirror).to(z.dtype),
            upend=(u[:, 1] < 0.5 * p).to(z.dtype),
            scale=chosen[:, 2] * z[:, 6],
            angle=chosen[:, 3] * turn[:, 7],
            stretch=chosen[:, 4] * z[:, 8],
            axis=chosen[:, 4] * turn[:, 9],
            right=chosen[:, 5] * z[:, 10],
            down=chosen[:, 5] * z[:, 11],
        )

    def labels(self) -> Tensor:
        """(B, LABELS), zero for the identity, continuous at a full turn."""
        return torch.stack(
            [
                self.mirror,
                self.upend,
                self.scale,
                self.angle.cos() - 1,
                self.angle.sin(),
                self.stretch * self.axis.cos(),
                self.stretch * self.axis.sin(),
                self.right,
                self.down,
            ],
            dim=1,
        )

    def flip(self, images: Tensor) -> Tensor:
        """Apply the flips to ``images`` (B, C, H, W), without interpolation."""
        images = torch.where(_over(self.mirror), images.flip(3), images)
        return torch.where(_over(self.upend), images.flip(2), images)

    def warp(self, images: Tensor) -> Tensor:
        """Apply the others to square ``images`` (B, C, H, H), in one interpolation.

        The outside is the reflection at the border; images without transformations are returned
        unchanged.
        """
        grid = F.affine_grid(_source(self), list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False)
        geometry = torch.stack([self.scale, self.angle, self.stretch, self.right, self.down])
        return torch.where(_over(geometry.any(0)), moved, images)


def _source(change: Change) -> Tensor:
    """Affine maps (B, 2, 3) from positions in the result to positions in the image, in [-1, 1]."""
    wide = 2 ** (OCTAVES * change.stretch)
    narrowed = torch.diag_embed(torch.stack([1 / wide, wide], dim=1))
    back = _turn(-change.angle) @ _turn(change.axis) @ narrowed @ _turn(-change.axis)
    back = back * (2 ** (-OCTAVES * change.scale))[:, None, None]
    shift = 2 * SHIFT * torch.stack([change.right, change.down], dim=1)[..., None]
    return torch.cat([back, -back @ shift], dim=2)


def _turn(angle: Tensor) -> Tensor:
    """(B, 2, 2) counter-clockwise rotations of (right, down)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)


def _over(flag: Tensor) -> Tensor:
    """(B,) as a mask that broadcasts over images."""
    return flag.bool()[:, None, None, None]
