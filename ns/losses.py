"""Losses of images against the teacher's: what a refinement makes small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ns.spectrum import SpectralNorm, ring_means
from solvers.types import Denoiser

#: The loss of every image, (B,), given images, the teacher's images and the denoiser of the batch.
Loss = Callable[[Tensor, Tensor, Denoiser], Tensor]

LOSSES = ("spectral", "l2", "huber", "features")
#: Scale of the pseudo-Huber loss, times the root of the number of values (arXiv:2310.14189).
HUBER = 0.00054
#: Noise levels at which the network looks at an image: from fine structure to its layout.
LEVELS = (0.1, 0.5, 2.0)
FLOOR = 1e-6  #: of the power per frequency, far below one grey level


def spectral(norm: SpectralNorm) -> Loss:
    """The norm of the difference."""
    return lambda images, teacher, _: norm(images - teacher)


def pseudo_huber(images: Tensor, teacher: Tensor, denoiser: Denoiser) -> Tensor:
    """``sqrt(|e|^2 + c^2) - c`` of the difference e: outliers count linearly (arXiv:2310.14189)."""
    square = (images - teacher).square().flatten(1).sum(1)
    c = HUBER * math.sqrt(images[0].numel())
    return (square + c**2).sqrt() - c


def feature_distance(images: Tensor, teacher: Tensor, denoiser: Denoiser) -> Tensor:
    """Mean squared difference of the model's own bottleneck features, relative to their size.

    Both images go through the network without noise, at each of `LEVELS`: six more calls.
    """
    total = images.new_zeros(len(images))
    for level in LEVELS:
        sigma = images.new_tensor(level)
        with torch.no_grad():
            wanted = denoiser(teacher, sigma).feat
        found = denoiser(images, sigma).feat
        if found is None or wanted is None:
            raise ValueError("this model returns no bottleneck features: give another --loss")
        error, size = (v.square().flatten(1).mean(1) for v in (found - wanted, wanted))
        total = total + error / size
    return total / len(LEVELS)


@dataclass(frozen=True, eq=False)
class EnergyDistance:
    """Adds the energy distance to a set of images, unpaired, to a loss of pairs.

    For statistics x, x' of this batch and y, y' of the set it is ``E|x - y| - E|x - x'| / 2 -
    E|y - y'| / 2`` (Szekely and Rizzo 2013), zero where the distributions are equal.
    Statistics are the logarithms of each channel's power in rings of equal frequency, and the
    channel's mean, over their deviations in the set: no network takes part.
    """

    pairs: Loss
    weight: float
    reference: Tensor  #: (M, F), statistics of the set in units of their deviation
    deviation: Tensor  #: (F,)
    spread: Tensor  #: (), half of the mean distance of the set's images from each other

    @classmethod
    def to(cls, batches: Iterable[Tensor], pairs: Loss, weight: float) -> EnergyDistance:
        """To the images of ``batches``, (B, C, H, W) each."""
        raw = torch.cat([statistics(batch) for batch in batches])
        deviation = raw.std(0).clamp(min=1e-6)
        reference = raw / deviation
        count = len(reference)
        spread = torch.cdist(reference, reference).sum() / (2 * count * (count - 1))
        return cls(pairs, weight, reference, deviation, spread)

    def __call__(self, images: Tensor, teacher: Tensor, denoiser: Denoiser) -> Tensor:
        return self.pairs(images, teacher, denoiser) + self.weight * self.distance(images)

    def distance(self, images: Tensor) -> Tensor:
        """Each image's part of the distance, (B,) for B > 1, whose mean has no bias."""
        if len(images) < 2:
            raise ValueError(
                "the unpaired term compares the images of a portion, which has 1: give a larger "
                "--batch or --batch-gpu, or --trajectories"
            )
        x = statistics(images) / self.deviation.to(images)
        across = torch.cdist(x, self.reference.to(x)).mean(1)
        others = torch.cdist(x, x).sum(1) / (len(x) - 1)
        return across - others / 2 - self.spread.to(x)


def statistics(images: Tensor) -> Tensor:
    """Log power per channel and ring, and the channels' means: (B, C R) for R rings."""
    power = torch.fft.fft2(images, norm="ortho").abs().square()
    logs = (ring_means(power)[..., 1:] + FLOOR).log()  # without the mean, which follows
    return torch.cat([logs, images.mean((-2, -1))[..., None]], dim=-1).flatten(1)
