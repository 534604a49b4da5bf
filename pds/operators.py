"""The linear operators of PDS, by real Fourier transforms.

Preconditioned diffusion sampling (Ma et al. 2022, arXiv:2207.02196; 2023, arXiv:2302.06504)
multiplies noise by ``A`` and scores by ``B``, where ``S`` is a factor per pixel and ``R`` a factor
per frequency:

    A = F^-1 R F S,        B = A A^T = F^-1 R F S^2 F^-1 R F.

Langevin dynamics ``dx = B grad log p dt + sqrt(2) A dw`` preserves ``p`` for every such pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """``A`` and ``B`` on states (B, C, H, W); without filters both are the identity."""

    freq: Tensor | None = None  #: ``R``, even: the half plane (C, H, W // 2 + 1) of ``rfft2``
    space: Tensor | None = None  #: ``S`` (C, H, W)
    odd: Tensor | None = None  #: the odd part of a published ``R`` (half plane), see `of`

    @classmethod
    def of(
        cls,
        freq_mask: Tensor | None,
        space_mask: Tensor | None,
        alpha: float,
        real_part_trick: bool = False,
    ) -> Preconditioner:
        """The operators of masks (C, H, W), see `to_filter`.

        If a frequency filter is not even, ``R(k) != R(-k)``, it maps real images to complex ones,
        of which the published code takes the real part.  In ``A z`` this is equivalent to the even
        part of the filter, which is used here.  In ``B g`` the published code takes the real part
        only at the end, so the imaginary part between the two filters adds ``Q S^2 Q^T`` (``i Q``
        is the odd part of the filter).  Then ``B`` is not ``A A^T``, and the chain does not
        preserve its target.  ``real_part_trick`` keeps this term, to reproduce the published code.
        """
        space = None if space_mask is None else to_filter(space_mask, alpha)
        if freq_mask is None:
            return cls(None, space)
        freq = to_filter(freq_mask, alpha)
        half = freq.shape[-1] // 2 + 1
        odd = (freq - mirrored(freq)) / 2
        even = (freq + mirrored(freq)) / 2
        return cls(even[..., :half], space, odd[..., :half] if real_part_trick else None)

    def to(self, x: Tensor) -> Preconditioner:
        """The same operators in the dtype and on the device of ``x``."""
        filters = (self.freq, self.space, self.odd)  # cast first: MPS has no float64
        return Preconditioner(*(f if f is None else f.to(x.dtype).to(x.device) for f in filters))

    def noise(self, z: Tensor) -> Tensor:
        """``A z``."""
        return _filtered(_scaled(z, self.space), self.freq)

    def drift(self, g: Tensor) -> Tensor:
        """``B g``."""
        inner = _scaled(_scaled(_filtered(g, self.freq), self.space), self.space)
        out = _filtered(inner, self.freq)
        if self.odd is None:
            return out
        q = -1j * self.odd  # the filter of the real operator Q, whose transpose is -Q
        return out - _filtered(_scaled(_scaled(_filtered(g, q), self.space), self.space), q)


def to_filter(mask: Tensor, alpha: float) -> Tensor:
    """``((m / max m + alpha - 1) / alpha)^-1``: from 1 at the largest entry to alpha/(alpha - 1).

    Raises UserError for an ``alpha`` of 1 or less, for which it may divide by zero.
    """
    if not alpha > 1:
        raise UserError(f"--alpha {alpha:g} is too small: give a number above 1, such as 5")
    return alpha / (mask / mask.max() + alpha - 1)


def mirrored(values: Tensor) -> Tensor:
    """``values`` (..., H, W) at the opposite frequencies: entry ``k`` becomes entry ``-k``."""
    return values.flip(-2, -1).roll((1, 1), (-2, -1))


def _filtered(x: Tensor, half_plane: Tensor | None) -> Tensor:
    if half_plane is None:
        return x
    return torch.fft.irfft2(torch.fft.rfft2(x) * half_plane, s=x.shape[-2:])


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
