"""The data of the experiment: points of a Gaussian mixture, as images of one pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from denoisers.analytic import MixtureDenoiser
from runtime.errors import UserError
from runtime.noise import SeedNoise


@dataclass(frozen=True)
class Mixture:
    """``components`` equal Gaussians ``N(mean_k, std^2 I)`` in ``dims`` dimensions.

    The means are drawn once, ``N(0, spread^2 I)``.  Both deviations together are about 0.5, which
    is EDM's sigma_data.  Raises UserError for numbers that make no mixture.
    """

    dims: int = 20
    components: int = 8
    spread: float = 0.5
    std: float = 0.15
    seed: int = 0  #: of the means

    def __post_init__(self) -> None:
        for name in ("dims", "components", "spread", "std"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(f"{name} of the mixture is {value}; give a number above 0")

    @property
    def means(self) -> Tensor:
        """(components, dims, 1, 1)."""
        shape = (self.components, self.dims, 1, 1)
        return self.spread * SeedNoise([self.seed]).normal("means", shape)[0]

    def sample(self, seeds: Sequence[int]) -> Tensor:
        """One point a seed, (B, dims, 1, 1)."""
        noise = SeedNoise(seeds)
        chosen = self.means[noise.integers("component", self.components)]
        return chosen + self.std * noise.normal("within", (self.dims, 1, 1))

    def denoiser(self) -> MixtureDenoiser:
        """The ideal denoiser of the mixture itself."""
        return MixtureDenoiser(self.means, self.std)


def point_denoiser(points: Tensor) -> MixtureDenoiser:
    """The ideal denoiser of the data set: each of the points (N, C, 1, 1) with probability 1/N.

    Its memory for a batch of B states is ``4 B N C`` bytes.
    """
    return MixtureDenoiser(points, torch.tensor(0.0))
