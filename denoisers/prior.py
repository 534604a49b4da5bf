"""The prior: the distribution of a state at the highest noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denoisers.cards import Card
from runtime.noise import Name, SeedNoise


def start(
    card: Card,
    noise: SeedNoise,
    sigma: float | Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
    name: Name = "latent",
) -> Tensor:
    """Samples of the prior at noise level ``sigma``, (B, *card.shape).

    The own state of a flow, ``x / (1 + sigma)``, is pure noise there, as in all of its pipelines.
    """
    scale = 1 + sigma if card.is_flow else sigma
    return unit_noise(card, noise, name, dtype, device) * scale


def unit_noise(
    card: Card,
    noise: SeedNoise,
    name: Name,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """The noise of the model's forward process at ``sigma = 1``, (B, *card.shape).

    Gaussian, except under PFGM++ (arXiv:2302.04265, appendix B): there the data, of
    ``n`` dimensions, has ``D`` more, in which it sits at distance ``r = sigma sqrt(D)``, and the
    field of a point charge gives a uniform direction in R^n and the norm ``r sqrt(b / (1 - b))``,
    ``b ~ Beta(n/2, D/2)``.  That is Student's t distribution with ``D`` degrees of freedom, and
    Gaussian for ``D`` to infinity.  The norm is the draw ``(*name, "norm")``.
    """
    if card.pfgmpp is None:
        return noise.normal(name, card.shape, dtype, device)
    n, added = math.prod(card.shape), card.pfgmpp
    parts = (name,) if isinstance(name, str) else name
    b = noise.beta((*parts, "norm"), n / 2, added / 2)
    norm = (added * b / (1 - b)).sqrt()
    direction = torch.nn.functional.normalize(
        noise.normal(name, card.shape, torch.float64).flatten(1)
    )
    return (norm[:, None] * direction).reshape(-1, *card.shape).to(dtype).to(device)
