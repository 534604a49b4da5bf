"""The U-Net of Dhariwal and Nichol (2021, arXiv:2105.05233), "ADM", as the EDM family trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from denoisers.nets.layers import Conv2d, GroupNorm, Linear, PositionalEmbedding, UNetBlock
from denoisers.nets.unet import EDMUNet, UNetSettings, decode_block


@dataclass(frozen=True, kw_only=True)
class DhariwalSettings(UNetSettings):
    """Its constructor settings, by default those for ImageNet 64x64."""

    model_channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)


class DhariwalUNet(EDMUNet):
    """ADM: adaptive group normalisation, heads of 64 channels, attention at several resolutions.

    ``settings`` are those of :class:`DhariwalSettings`; the bottleneck is an encoder block.  Raises
    ValueError for an unknown block, TypeError for an unknown setting.
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, **settings: Any
    ) -> None:
        own = DhariwalSettings(**settings)
        super().__init__(img_resolution, own)
        channels = own.model_channels
        emb_channels = channels * own.channel_mult_emb
        self.map_noise = PositionalEmbedding(channels)
        self.map_augment = (
            Linear(own.augment_dim, channels, bias=False) if own.augment_dim else None
        )
        self.map_layer0 = Linear(channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(own.label_dim, emb_channels, bias=False) if own.label_dim else None
        block = partial(UNetBlock, emb_channels=emb_channels, dropout=own.dropout)
        skips = self._build_encoder(block, in_channels, self.levels[0].channels)
        self._set_bottleneck(own.bottleneck)
        width = self._build_decoder(block, skips, attend_everywhere=True)
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, 3)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self._withhold(class_labels))
        return F.silu(emb)

    def apply_to(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        skips, feat = self._encode(x, emb)
        x = skips[-1]
        for block in self.dec.values():
            x = decode_block(block, x, emb, skips)
        return self.out_conv(self.out_norm(x, silu=True)), feat
