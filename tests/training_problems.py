"""A small problem in closed form for the tests of teachers and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from denoisers.analytic import MixtureDenoiser
from runtime.noise import SeedNoise
from solvers.types import Denoised, Denoiser

SHAPE = (2, 4, 4)


def mixture(spread: float = 0.7, std: float = 0.25, components: int = 4) -> MixtureDenoiser:
    """Components around zero, well apart; nothing about their ODE is linear."""
    generator = torch.Generator().manual_seed(1)
    means = spread * torch.randn(components, *SHAPE, generator=generator, dtype=torch.float64)
    return MixtureDenoiser(means, std)


def normals(numbers: Sequence[int]) -> Callable[[tuple], Tensor]:
    """Named noise of a few samples, (B, *SHAPE) float64."""
    noise = SeedNoise(numbers)
    return lambda name: noise.normal(name, SHAPE, torch.float64)


def starts(numbers: Sequence[int], sigma: float = 80.0) -> Tensor:
    return sigma * normals(numbers)(("latent",))


class Recorder:
    """A denoiser that remembers the sigma of every call."""

    cost = 1

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.sigmas: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        self.sigmas.append(sigma.detach().clone())
        return self.inner(x, sigma)


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry of ``b``."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
