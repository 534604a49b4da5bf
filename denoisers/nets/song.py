"""The U-Net of score-based SDEs (Song et al. 2021, arXiv:2011.13456): DDPM++ and NCSN++."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
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


class SongUNet(nn.Module):
    """DDPM++ by default; NCSN++ with Fourier embedding, residual encoder and a (1,3,3,1) filter.

    ``bottleneck`` names the module whose channel mean the forward returns as well: an encoder block
    (the default is the last one), or the end of the middle, ``<size>_in1``.  Raises ValueError for
    an unknown embedding, encoder, decoder or block.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
        bottleneck: str | None = None,
    ) -> None:
        super().__init__()
        one_of("embedding_type", embedding_type, ("positional", "fourier"))
        one_of("encoder_type", encoder_type, ("standard", "skip", "residual"))
        one_of("decoder_type", decoder_type, ("standard", "skip"))
        self.label_dropout = label_dropout
        self.resample_filter = tuple(resample_filter)
        noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb
        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
        )
        # (resolution, channels, attention) of each level, finest first
        levels = [
            (img_resolution >> i, model_channels * mult, img_resolution >> i in attn_resolutions)
            for i, mult in enumerate(channel_mult)
        ]
        self.enc = nn.ModuleDict()
        skips = self._build_encoder(
            block, levels, in_channels, model_channels, num_blocks, encoder_type
        )
        self.bottleneck = bottleneck or list(self.enc)[-1]
        coarsest = levels[-1][0]
        one_of("bottleneck", self.bottleneck, (*self.enc, f"{coarsest}x{coarsest}_in1"))
        self.dec = nn.ModuleDict()
        self._build_decoder(block, levels, out_channels, num_blocks, decoder_type, skips)

    def _build_encoder(
        self,
        block: Callable[..., UNetBlock],
        levels: Sequence[tuple[int, int, bool]],
        in_channels: int,
        model_channels: int,
        num_blocks: int,
        encoder_type: str,
    ) -> list[int]:
        """Fill ``enc``; return the widths of what the decoder takes over.

        A second pyramid of the input feeds the skip and the residual encoder.
        """
        aux = partial(Conv2d, down=True, resample_filter=self.resample_filter)
        width, aux_width = model_channels, in_channels
        skips = []
        for res, channels, attention in levels:
            name = f"{res}x{res}"
            if res == levels[0][0]:
                self.enc[f"{name}_conv"] = Conv2d(in_channels, width, 3)
            else:
                self.enc[f"{name}_down"] = block(width, width, down=True)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = aux(aux_width, aux_width, 0)
                    self.enc[f"{name}_aux_skip"] = Conv2d(aux_width, width, 1)
                elif encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = aux(aux_width, width, 3, conv_first=True)
                    aux_width = width
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(width, channels, attention=attention)
                width = channels
                skips.append(width)
        return skips

    def _build_decoder(
        self,
        block: Callable[..., UNetBlock],
        levels: Sequence[tuple[int, int, bool]],
        out_channels: int,
        num_blocks: int,
        decoder_type: str,
        skips: list[int],
    ) -> None:
        """Fill ``dec``; the skip decoder sums one image per level, the standard one ends in one."""
        aux_up = partial(Conv2d, up=True, resample_filter=self.resample_filter)
        coarsest, finest = levels[-1][0], levels[0][0]
        width = levels[-1][1]
        for res, channels, attention in reversed(levels):
            name = f"{res}x{res}"
            if res == coarsest:
                self.dec[f"{name}_in0"] = block(width, width, attention=True)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, up=True)
            for i in range(num_blocks + 1):
                last = i == num_blocks
                self.dec[f"{name}_block{i}"] = block(
                    width + skips.pop(), channels, attention=attention and last
                )
                width = channels
            if decoder_type == "skip" and res != coarsest:
                self.dec[f"{name}_aux_up"] = aux_up(out_channels, out_channels, 0)
            if decoder_type == "skip" or res == finest:
                self.dec[f"{name}_aux_norm"] = GroupNorm(width, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(width, out_channels, 3)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """Embedding (B, emb_channels) of noise labels (B,), one-hot classes and augmentations."""
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).flatten(1)  # this family: [sin, cos]
        if self.map_label is not None and class_labels is not None:
            if self.training and self.label_dropout:
                keep = torch.rand_like(class_labels[:, :1]) >= self.label_dropout
                class_labels = class_labels * keep
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw output (B, out_channels, H, W) and the bottleneck's channel mean (B, h, w)."""
        emb = self.embed(noise_labels, class_labels, augment_labels)
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
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb)
            if name == self.bottleneck and name not in self.enc:  # blocks of both share names
                feat = channel_mean(x)
        assert image is not None  # every decoder ends with an image
        return image, feat

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[list[Tensor], Tensor]:
        """States kept for the decoder, and the channel mean of the bottleneck."""
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
