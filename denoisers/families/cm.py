"""U-Nets of consistency models (Song et al. 2023, arXiv:2303.01469), as denoisers.

The published checkpoints include the EDM teachers on which consistency models were distilled;
both are called alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.conditions import check_batch, refuse_guidance
from denoisers.families.adm import check_conditions, load_unet
from denoisers.files import Files
from denoisers.nets.openai import UNet
from runtime.errors import UserError
from solvers.types import Denoised

SIGMA_DATA = 0.5
TINY = 1e-44  #: keeps the logarithm finite at sigma = 0


@dataclass(eq=False)
class CMDenoiser:
    """A network with its classes bound in: one evaluation per call."""

    net: UNet
    labels: Tensor | None  #: (B,) int64, or None
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype.

        EDM's preconditioning (arXiv:2206.00364, table 1) around a time of ``1000 ln(sigma) / 4``.
        """
        check_batch(self.labels, x)
        wide = torch.promote_types(x.dtype, torch.float32)
        state, sigma = x.to(wide), sigma.to(wide).to(x.device)  # cast first: MPS has no float64
        total = sigma**2 + SIGMA_DATA**2
        times = 250 * (sigma + TINY).log().reshape(-1).expand(len(x))
        raw, feat = self.net(state / total.sqrt(), times, self.labels)
        c_out = sigma * SIGMA_DATA / total.sqrt()
        x0 = SIGMA_DATA**2 / total * state + c_out * raw.to(x.device).to(wide)
        return Denoised(x0.to(x.dtype), feat.to(x.device).to(x.dtype))


@dataclass(frozen=True, eq=False)
class CMModel:
    """A loaded network of this family."""

    card: Card
    sha256: str  #: of the weights that were loaded
    net: UNet

    def decode(self, x: Tensor) -> Tensor:
        """Samples of these models are images."""
        return x

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> CMDenoiser:
        """Fix the classes, (B,) int64, of a network that has them.

        Raises UserError for labels that are missing, unwanted or out of range, guidance, or
        prompts.
        """
        refuse_guidance(self.card, guidance_rate)
        check_conditions(self.card, self.net, labels, prompts)
        return CMDenoiser(self.net, labels)


def load_cm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> CMModel:
    """Load ``files.main``; see :func:`registry.load_model`."""
    net, card, digest = load_unet(card, files.main, device, dtype)
    if net.out_channels != card.channels:
        raise UserError(
            f"{files.main} predicts {net.out_channels} channels where '{card.name}' needs "
            f"{card.channels}; it holds the weights of another family"
        )
    return CMModel(card, digest, net)
