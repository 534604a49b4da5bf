"""Where sampling starts: the distribution of a state at the highest noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.noise import Name, SeedNoise

from .cards import Card


def start(
    card: Card,
    noise: SeedNoise,
    sigma: float | Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
    name: Name = "latent",
) -> Tensor:
    """States (B, *card.shape) at level ``sigma``: Gaussian."""
    return noise.normal(name, card.shape, dtype, device) * sigma
