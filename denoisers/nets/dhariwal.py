"""The U-Net of Dhariwal and Nichol (2021, arXiv:2105.05233), "ADM", as the EDM family trains it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoisers.nets.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    channel_mean,
    one_of,
)


class DhariwalUNet(nn.Module):
    """ADM: adaptive group normalisation, heads of 64 channels, attention at several resolutions.

    ``bottleneck`` names the encoder block whose channel mean the forward returns as well; the
    default is the last one.  Raises ValueError for an unknown block.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        bottleneck: str | None = None,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None

        block = partial(UNetBlock, emb_channels=emb_channels, dropout=dropout)
        levels = [(img_resolution >> i, model_channels * m) for i, m in enumerate(channel_mult)]
        finest, coarsest = levels[0][0], levels[-1][0]
        self.enc = nn.ModuleDict()
        width = levels[0][1]
        skips = []
        for res, channels in levels:
            if res == finest:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, down=True)
            skips.append(width)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(width, channels, attention=attention)
                width = channels
                skips.append(width)
        self.bottleneck = bottleneck or list(self.enc)[-1]
        one_of("bottleneck", self.bottleneck, tuple(self.enc))

        self.dec = nn.ModuleDict()
        for res, channels in reversed(levels):
            if res == coarsest:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                cin, attention = width + skips.pop(), res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(cin, channels, attention=attention)
                width = channels
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, 3)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """Embedding (B, emb_channels) of noise labels (B,), one-hot classes and augmentations."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            if self.training and self.label_dropout:
                keep = torch.rand_like(class_labels[:, :1]) >= self.label_dropout
                class_labels = class_labels * keep
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw output (B, out_channels, H, W) and the bottleneck's channel mean (B, h, w)."""
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        feat = channel_mean(x)
        for name, module in self.enc.items():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
            if name == self.bottleneck:
                feat = channel_mean(x)
        for module in self.dec.values():
            if x.shape[1] != module.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, emb)
        return self.out_conv(self.out_norm(x, silu=True)), feat
