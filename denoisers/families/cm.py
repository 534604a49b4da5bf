"""U-Nets of consistency models (Song et al. 2023, arXiv:2303.01469), as denoisers.

The published checkpoints include the EDM teachers from which consistency models were distilled;
both are evaluated in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from denoisers.cards import Card
from denoisers.families.adm import load_unet
from denoisers.families.common import LoadedModel, check_batch, require_labels
from denoisers.families.precond import edm_scaling
from denoisers.nets.openai import UNet
from denoisers.precision import widened
from denoisers.protocol import Files
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

        EDM's preconditioning (arXiv:2206.00364, table 1) at the network time
        ``1000 ln(sigma) / 4``.
        """
        check_batch(self.labels, x)
        state, sigma = widened(x, sigma)
        c_skip, c_out, root = edm_scaling(sigma, SIGMA_DATA)
        times = 250 * (sigma + TINY).log().reshape(-1).expand(len(x))
        raw, feat = self.net(state / root, times, self.labels)
        x0 = c_skip * state + c_out * raw.to(x.device).to(state.dtype)
        return Denoised(x0.to(x.dtype), feat.to(x.device).to(x.dtype))


@dataclass(frozen=True, eq=False)
class CMModel(LoadedModel):
    """A loaded network of this family."""

    net: UNet

    @property
    def network(self) -> nn.Module:
        return self.net

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> CMDenoiser:
        require_labels(self.card, labels, self.net.settings.num_classes)
        return CMDenoiser(self.net, labels)


def load_cm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> CMModel:
    """Load ``files.main``; see :func:`registry.load_model`."""
    net, card, digest = load_unet(card, files.main, device, dtype)
    if net.settings.out_channels != card.channels:
        raise UserError(
            f"{files.main} predicts {net.settings.out_channels} channels where '{card.name}' needs "
            f"{card.channels}; it holds the weights of another family"
        )
    return CMModel(card, digest, net)
