"""The error that NS solvers are fitted and judged by: per spatial frequency, relative to images.

Images have most of their power in low frequencies, and a plain squared error sees little else.
Divided by a power of the images' own spectrum, an error in fine structure counts as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Reduce = Callable[[Tensor], object]  #: sums a tensor over processes in place


@dataclass(frozen=True, eq=False)
class SpectralNorm:
    """The norm ``mean_f w(f) |FFT(e)(f)|^2`` of errors (B, C, H, W), ``w = power^-exponent``.

    ``power`` is the mean power of images at the frequency's distance from zero.  The mean of ``w``
    is 1, so ``exponent = 0`` gives the mean squared error.
    """

    weights: Tensor  #: (H, W) float64, for the frequencies of ``fft2``

    @classmethod
    def of(
        cls, batches: Sequence[Tensor], exponent: float, reduce: Reduce = lambda _: None
    ) -> SpectralNorm:
        """The norm for images like those of ``batches``, (B, C, H, W) each."""
        power = torch.zeros(batches[0].shape[-2:], dtype=torch.float64)
        for batch in batches:
            spectrum = torch.fft.fft2(batch.to("cpu", torch.float64), norm="ortho")
            power += spectrum.abs().square().mean(1).sum(0)
        reduce(power)  # its scale, the number of images, cancels
        weights = radial_mean(power) ** -exponent
        return cls(weights / weights.mean())

    def __call__(self, error: Tensor) -> Tensor:
        """The norm of every sample's error, (B,)."""
        return self.whiten(error).square().flatten(1).mean(1)

    def whiten(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) with its frequencies scaled by ``sqrt(w)``."""
        root = self.weights.sqrt().to(x.device, x.dtype)
        return torch.fft.ifft2(torch.fft.fft2(x) * root).real


def rings(height: int, width: int) -> Tensor:
    """The ring of every frequency of ``fft2``, (H, W): its radius in whole numbers.

    Radii are multiples of the lowest frequency of the shorter side, rounded.
    """
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    return (torch.hypot(y, x) * min(height, width)).round().to(torch.int64)


def ring_means(power: Tensor) -> Tensor:
    """The means of ``power`` (..., H, W) over each ring, (..., R)."""
    ring = rings(*power.shape[-2:]).flatten().to(power.device)
    sums = power.new_zeros(*power.shape[:-2], int(ring.max()) + 1)
    counts = torch.bincount(ring).clamp(min=1)
    return sums.index_add(-1, ring, power.flatten(-2)) / counts


def radial_mean(power: Tensor) -> Tensor:
    """``power`` (H, W) over the frequencies of ``fft2``, averaged over each ring."""
    return ring_means(power)[rings(*power.shape)]
