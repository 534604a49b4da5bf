"""The common frame of the EDM family's networks (Karras et al. 2022, arXiv:2206.00364).

Module names are those of the published checkpoints, ``enc.<size>x<size>_block<i>`` and so on, and
modules are created in the published order: averaged weights are published as bare lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from denoisers.nets.layers import Conv2d, Linear, UNetBlock, channel_mean, one_of

MakeBlock = Callable[..., UNetBlock]  #: from the channels and the options of one block


class EDMNetwork(nn.Module):
    """A network conditioned on a noise label and, optionally, on classes and augmentations."""

    bottleneck: str  #: module whose channel mean the forward returns as well
    label_dropout: float  #: probability of withholding a sample's class in training
    map_layer0: Linear
    map_augment: Linear | None

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """Embedding (B, emb_channels) of noise labels (B,), one-hot classes and augmentations."""
        raise NotImplementedError

    def apply_to(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass, given the embedding."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw output (B, out_channels, H, W) and the bottleneck's channel mean (B, h, w)."""
        return self.apply_to(x, self.embed(noise_labels, class_labels, augment_labels))

    def _withhold(self, class_labels: Tensor) -> Tensor:
        """One-hot classes (B, K), in training zero with probability ``label_dropout``."""
        if not (self.training and self.label_dropout):
            return class_labels
        return class_labels * (torch.rand_like(class_labels[:, :1]) >= self.label_dropout)


@dataclass(frozen=True, kw_only=True)
class UNetSettings:
    """Constructor settings that the two U-Nets share, under their published names."""

    label_dim: int = 0  #: classes; 0 for an unconditional network
    augment_dim: int = 0  #: augmentation labels; 0 for none
    model_channels: int
    channel_mult: Sequence[int]  #: channels of each level over ``model_channels``, finest first
    channel_mult_emb: int = 4
    num_blocks: int  #: residual blocks per level
    attn_resolutions: Sequence[int]
    dropout: float = 0.10
    label_dropout: float = 0.0
    bottleneck: str | None = None  #: the default is the last encoder block


class UNetLevel(NamedTuple):
    """The blocks of one resolution."""

    resolution: int
    channels: int
    attention: bool

    @property
    def name(self) -> str:
        return f"{self.resolution}x{self.resolution}"


class EDMUNet(EDMNetwork):
    """Encoder and decoder of the two U-Nets, level by level."""

    def __init__(self, img_resolution: int, settings: UNetSettings) -> None:
        super().__init__()
        self.label_dropout = settings.label_dropout
        self.num_blocks = settings.num_blocks
        #: finest first
        self.levels = [
            UNetLevel(
                img_resolution >> i,
                settings.model_channels * multiple,
                img_resolution >> i in settings.attn_resolutions,
            )
            for i, multiple in enumerate(settings.channel_mult)
        ]

    def _build_encoder(self, block: MakeBlock, in_channels: int, width: int) -> list[int]:
        """Fill ``enc``; return the channels of each state that is passed on to the decoder."""
        self.enc = nn.ModuleDict()
        skips = []
        for level in self.levels:
            if level is self.levels[0]:
                self.enc[f"{level.name}_conv"] = Conv2d(in_channels, width, 3)
            else:
                self.enc[f"{level.name}_down"] = block(width, width, down=True)
                self._extend_encoder(level, width)
            skips.append(width)
            for i in range(self.num_blocks):
                self.enc[f"{level.name}_block{i}"] = block(
                    width, level.channels, attention=level.attention
                )
                width = level.channels
                skips.append(width)
        return skips

    def _extend_encoder(self, level: UNetLevel, width: int) -> None:
        """Add modules after a downsampling to ``width`` channels; none by default."""

    def _set_bottleneck(self, name: str | None, *others: str) -> None:
        """Choose an encoder block, the last one by default, or one of ``others``."""
        self.bottleneck = name or list(self.enc)[-1]
        one_of("bottleneck", self.bottleneck, (*self.enc, *others))

    def _build_decoder(self, block: MakeBlock, skips: list[int], *, attend_everywhere: bool) -> int:
        """Fill ``dec``; return the channels of its last block.

        Where a level has attention it is in all of its blocks, or in the last one only.
        """
        self.dec = nn.ModuleDict()
        width = skips[-1]
        for level in reversed(self.levels):
            if level is self.levels[-1]:
                self.dec[f"{level.name}_in0"] = block(width, width, attention=True)
                self.dec[f"{level.name}_in1"] = block(width, width)
            else:
                self.dec[f"{level.name}_up"] = block(width, width, up=True)
            for i in range(self.num_blocks + 1):
                attention = level.attention and (attend_everywhere or i == self.num_blocks)
                self.dec[f"{level.name}_block{i}"] = block(
                    width + skips.pop(), level.channels, attention=attention
                )
                width = level.channels
            self._extend_decoder(level, width)
        return width

    def _extend_decoder(self, level: UNetLevel, width: int) -> None:
        """Add modules after the blocks of a level, of ``width`` channels; none by default."""

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """The states that are passed on to the decoder, and the bottleneck's channel mean."""
        skips: list[Tensor] = []
        feat = channel_mean(x)
        for name, module in self.enc.items():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
            if name == self.bottleneck:
                feat = channel_mean(x)
        return skips, feat


def decode_block(block: nn.Module, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
    """Apply a decoder block to ``x``, with the encoder's last state appended if it takes both."""
    if x.shape[1] != block.in_channels:
        x = torch.cat([x, skips.pop()], dim=1)
    return block(x, emb)
