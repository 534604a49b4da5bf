"""Non-leaky augmentation of training images (Karras et al. 2022, arXiv:2206.00364, appendix F.2).

A network is told what was done to an image by 9 labels, and a sample asks for the image to which
nothing was done: all zeros.  So samples are not mirrored, turned or blurred, however much the
training images are.  The transformations, their strengths and their labels are the published ones;
images are sampled by bicubic interpolation where the published code filters with a wavelet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = 9  #: ``augment_dim`` of a network that is told
DRAWS = 12  #: random numbers that an image needs
OCTAVES = 0.2  #: deviation of log2 of a scale
SHIFT = 1 / 8  #: deviation of a translation, in sides of the image


class Change(NamedTuple):
    """What is done to each of B images, in this order; (B,) tensors in which 0 does nothing."""

    mirror: Tensor  #: 1: left and right are exchanged
    upend: Tensor  #: 1: top and bottom are
    scale: Tensor  #: the image grows 2^(OCTAVES scale) times
    angle: Tensor  #: it turns counter-clockwise, in radians
    stretch: Tensor  #: it grows 2^(OCTAVES stretch) times along ``axis`` and shrinks so across it
    axis: Tensor  #: counter-clockwise from the horizontal, in radians
    right: Tensor  #: it moves, in units of SHIFT sides
    down: Tensor

    @classmethod
    def draw(cls, z: Tensor, p: float, mirror: bool) -> Change:
        """From standard normal numbers ``z`` (B, DRAWS).

        Each transformation is done with probability ``p``; only mirroring, if it is allowed at
        all, always has probability 1/2, and turning upside down p/2.
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
        """(B, LABELS), zero where nothing is done, without a jump where a turn is complete."""
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
        """The first two transformations of ``images`` (B, C, H, W); exact."""
        images = torch.where(_over(self.mirror), images.flip(3), images)
        return torch.where(_over(self.upend), images.flip(2), images)

    def warp(self, images: Tensor) -> Tensor:
        """The others, of square ``images`` (B, C, H, H), in one interpolation.

        What lies outside is reflected at the border; an image to which nothing is done is left as
        it is, to the last bit.
        """
        grid = F.affine_grid(_source(self), list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False)
        geometry = torch.stack([self.scale, self.angle, self.stretch, self.right, self.down])
        return torch.where(_over(geometry.any(0)), moved, images)


def _source(change: Change) -> Tensor:
    """(B, 2, 3): from where in the image, in [-1, 1], a place in the result is taken."""
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
    return flag.bool()[:, None, None, None]
