"""The first stage of latent diffusion: a vector-quantised decoder, from latents to images.

Rombach et al. 2022 (arXiv:2112.10752, section 3.1 and appendix G), after Esser et al. 2021
(arXiv:2012.09841): the nearest code, a 1x1 convolution, and a convolutional decoder with attention
in its middle only.  Attribute names are those of the published checkpoints; the encoder and the
training loss that come with them are not needed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.weights import axis_size, filled
from denoisers.nets.batch_invariant import InvariantConv2d
from denoisers.nets.layers import attention
from denoisers.nets.openai_blocks import Upsample

DECODING = ("quantize.", "post_quant_conv.", "decoder.")  #: the parts that are used here
CHUNK = 4  #: images decoded at a time: the distances to 8192 codes take 128 MiB each


class VQDecoder(nn.Module):
    """``decoder(post_quant_conv(nearest code))``.

    There are ``codes`` vectors of ``embed_dim`` channels.  ``widths`` are the channels of the
    levels, finest first, each with ``num_blocks`` residual blocks; all but the finest upsample.
    """

    def __init__(
        self,
        *,
        codes: int,
        embed_dim: int,
        z_channels: int,
        out_channels: int,
        widths: Sequence[int],
        num_blocks: int,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.factor = 2 ** (len(widths) - 1)  #: resolution of images over that of latents
        self.quantize = Quantizer(codes, embed_dim)
        self.post_quant_conv = InvariantConv2d(embed_dim, z_channels, 1)
        self.decoder = Decoder(z_channels, out_channels, widths, num_blocks)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        """Images (B, out_channels, H, W), nominally in [-1, 1], of latents (B, embed_dim, h, w).

        Latents may have any dtype and device; images have those of the weights.
        """
        weight = self.quantize.embedding.weight
        parts = z.to(weight.dtype).to(weight.device).split(CHUNK)
        return torch.cat([self.decoder(self.post_quant_conv(self.quantize(p))) for p in parts])


class Quantizer(nn.Module):
    """Replaces each vector of a latent by the closest of ``codes`` vectors."""

    def __init__(self, codes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        vectors = z.permute(0, 2, 3, 1)
        # With the expanded square |z|^2 - 2 z e + |e|^2, rounding would decide between close codes.
        distances = torch.cdist(
            vectors.flatten(0, 2),
            self.embedding.weight,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return self.embedding(distances.argmin(1)).view_as(vectors).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """A convolutional decoder; ``up[i]`` is level i, of which 0 is the finest."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], num_blocks: int
    ) -> None:
        super().__init__()
        coarse = widths[-1]
        self.conv_in = InvariantConv2d(in_channels, coarse, 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": ResnetBlock(coarse, coarse),
                "attn_1": AttnBlock(coarse),
                "block_2": ResnetBlock(coarse, coarse),
            }
        )
        self.up = nn.ModuleList(
            DecoderLevel(before, width, num_blocks, upsample=i > 0)
            for i, (before, width) in enumerate(zip([*widths[1:], coarse], widths, strict=True))
        )
        self.norm_out = normalize(widths[0])
        self.conv_out = InvariantConv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for part in (*self.mid.values(), *reversed(self.up)):
            h = part(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then upsampling by 2."""

    def __init__(self, in_channels: int, width: int, num_blocks: int, *, upsample: bool) -> None:
        super().__init__()
        inputs = [in_channels] + [width] * (num_blocks - 1)
        self.block = nn.Sequential(*(ResnetBlock(channels, width) for channels in inputs))
        self.upsample = Upsample(width) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class ResnetBlock(nn.Module):
    """Two normalised convolutions with a residual connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = normalize(in_channels)
        self.conv1 = InvariantConv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalize(out_channels)
        self.conv2 = InvariantConv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else InvariantConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Self-attention over pixels with a single head and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalize(channels)
        self.q = InvariantConv2d(channels, channels, 1)
        self.k = InvariantConv2d(channels, channels, 1)
        self.v = InvariantConv2d(channels, channels, 1)
        self.proj_out = InvariantConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))
        return x + self.proj_out(attention(q, k, v)[:, 0].mT.reshape(x.shape))


def normalize(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups and the epsilon of published first stages."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def load_first_stage(tensors: Mapping[str, Tensor], source: str) -> VQDecoder:
    """The decoder of a first stage; UserError if ``tensors`` are of another kind of network.

    Names under ``quantize``, ``post_quant_conv`` and ``decoder`` must match; others are ignored.
    """
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(DECODING)}
    settings = settings_from(own, source)
    return filled(lambda: VQDecoder(**settings), own, source)


def settings_from(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of :class:`VQDecoder`, inferred from names and shapes."""

    def size(name: str, axis: int = 0) -> int:
        return axis_size(tensors, name, axis, source, "a vector-quantised first stage")

    def count(pattern: str) -> int:
        """The number of different values of the group in ``pattern``."""
        return len({m[1] for name in tensors if (m := re.match(pattern, name))})

    levels = count(r"decoder\.up\.(\d+)\.block\.0\.") or 1
    return {
        "codes": size("quantize.embedding.weight"),
        "embed_dim": size("quantize.embedding.weight", 1),
        "z_channels": size("post_quant_conv.weight"),
        "out_channels": size("decoder.conv_out.weight"),
        "widths": [size(f"decoder.up.{i}.block.0.conv1.weight") for i in range(levels)],
        "num_blocks": count(r"decoder\.up\.0\.block\.(\d+)\."),
    }
