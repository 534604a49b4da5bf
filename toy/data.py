"""The data of the experiment: points from a Gaussian mixture, as images of one pixel."""

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

    The means are drawn once from ``N(0, spread^2 I)``.  The total standard deviation is about 0.5,
    EDM's sigma_data.  Raises UserError for values that are not positive.
    """

    dims: int = 20
    components: int = 8
    spread: float = 0.5
    std: float = 0.15
    seed: int = 0  #: seed of the means

    def __post_init__(self) -> None:
        for name in ("dims", "components", "spread", "std"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(f"the mixture's {name} is {value}; give a number above 0")

    @property
    def means(self) -> Tensor:
        """(components, dims, 1, 1)."""
        shape = (self.components, self.dims, 1, 1)
        return self.spread * SeedNoise([self.seed]).normal("means", shape)[0]

    def sample(self, seeds: Sequence[int]) -> Tensor:
        """One point per seed, (B, dims, 1, 1)."""
        noise = SeedNoise(seeds)
        chosen = self.means[noise.integers("component", self.components)]
        return chosen + self.std * noise.normal("within", (self.dims, 1, 1))

    def denoiser(self) -> MixtureDenoiser:
        """The ideal denoiser of the mixture."""
        return MixtureDenoiser(self.means, self.std)


def point_denoiser(points: Tensor) -> MixtureDenoiser:
    """The ideal denoiser of a data set: each of the points (N, C, 1, 1) has probability 1/N.

    It takes ``4 B N C`` bytes for a batch of B states.
    """
    return MixtureDenoiser(points, torch.tensor(0.0))
