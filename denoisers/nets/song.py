"""The U-Net of score-based SDEs (Song et al. 2021, arXiv:2011.13456): DDPM++ and NCSN++."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from denoisers.nets.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    channel_mean,
    one_of,
)
from denoisers.nets.unet import EDMUNet, UNetLevel, UNetSettings, decode_block


@dataclass(frozen=True, kw_only=True)
class SongSettings(UNetSettings):
    """Its constructor settings, by default those of DDPM++ for CIFAR-10.

    Raises ValueError for an unknown embedding, encoder or decoder.
    """

    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[int] = (1, 1)

    def __post_init__(self) -> None:
        one_of("embedding_type", self.embedding_type, ("positional", "fourier"))
        one_of("encoder_type", self.encoder_type, ("standard", "skip", "residual"))
        one_of("decoder_type", self.decoder_type, ("standard", "skip"))


class SongUNet(EDMUNet):
    """DDPM++ by default; NCSN++ with Fourier embedding, residual encoder and a (1,3,3,1) filter.

    ``settings`` are those of :class:`SongSettings`.  The bottleneck is an encoder block, or the end
    of the middle, ``<size>_in1``.  Raises ValueError for an unknown embedding, encoder, decoder or
    block, TypeError for an unknown setting.
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, **settings: Any
    ) -> None:
        own = SongSettings(**settings)
        super().__init__(img_resolution, own)
        self.encoder_type, self.decoder_type = own.encoder_type, own.decoder_type
        self.in_channels, self.out_channels = in_channels, out_channels
        noise_channels = own.model_channels * own.channel_mult_noise
        emb_channels = own.model_channels * own.channel_mult_emb
        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if own.embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(own.label_dim, noise_channels) if own.label_dim else None
        augment_dim = own.augment_dim
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self._resampler = partial(Conv2d, resample_filter=tuple(own.resample_filter))
        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            num_heads=1,
            dropout=own.dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=own.resample_filter,
            resample_proj=True,
            adaptive_scale=False,
        )
        skips = self._build_encoder(block, in_channels, own.model_channels)
        self._set_bottleneck(own.bottleneck, f"{self.levels[-1].name}_in1")
        self._build_decoder(block, skips, attend_everywhere=False)

    def _extend_encoder(self, level: UNetLevel, width: int) -> None:
        """A second pyramid, of the downsampled input, joins the skip and the residual encoder."""
        down = partial(self._resampler, down=True)
        if self.encoder_type == "skip":
            self.enc[f"{level.name}_aux_down"] = down(self.in_channels, self.in_channels, 0)
            self.enc[f"{level.name}_aux_skip"] = Conv2d(self.in_channels, width, 1)
        elif self.encoder_type == "residual":
            before = [m for name, m in self.enc.items() if name.endswith("aux_residual")]
            channels = before[-1].out_channels if before else self.in_channels
            self.enc[f"{level.name}_aux_residual"] = down(channels, width, 3, conv_first=True)

    def _extend_decoder(self, level: UNetLevel, width: int) -> None:
        """The skip decoder sums one image per level; the standard one ends in a single image."""
        if self.decoder_type == "skip" and level is not self.levels[-1]:
            up = self._resampler(self.out_channels, self.out_channels, 0, up=True)
            self.dec[f"{level.name}_aux_up"] = up
        if self.decoder_type == "skip" or level is self.levels[0]:
            self.dec[f"{level.name}_aux_norm"] = GroupNorm(width, eps=1e-6)
            self.dec[f"{level.name}_aux_conv"] = Conv2d(width, self.out_channels, 3)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).flatten(1)  # this family: [sin, cos]
        if self.map_label is not None and class_labels is not None:
            classes = self._withhold(class_labels) * math.sqrt(self.map_label.in_features)
            emb = emb + self.map_label(classes)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def apply_to(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        skips, feat = self._encode(x, emb)
        x = skips[-1]
        image, hidden = None, x
        for name, module in self.dec.items():
            if name.endswith("aux_up"):
                image = module(image)
            elif name.endswith("aux_norm"):
                hidden = module(x, silu=True)
            elif name.endswith("aux_conv"):
                new = module(hidden)
                image = new if image is None else image + new
            else:
                x = decode_block(module, x, emb, skips)
            if name == self.bottleneck and name not in self.enc:  # blocks of both share names
                feat = channel_mean(x)
        assert image is not None  # every decoder ends with an image
        return image, feat

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        aux = x
        skips: list[Tensor] = []
        feat = channel_mean(x)
        for name, module in self.enc.items():
            if name.endswith("aux_down"):
                aux = module(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + module(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + module(aux)) * math.sqrt(0.5)
            else:
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
            if name == self.bottleneck:
                feat = channel_mean(x)
        return skips, feat
