"""Modules of the U-Net of guided diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233).

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoisers.nets.batch_invariant import InvariantConv2d, InvariantLinear
from denoisers.nets.layers import attention
from denoisers.precision import wide_dtype
from runtime.errors import UserError

GROUPS = 32  #: of every normalisation
#: Channels of ``qkv``: "legacy" (head, q/k/v, channel); "new" and "flash" (q/k/v, head, channel).
#: The flash layout keeps its 1x1 convolutions two-dimensional.
ATTENTIONS = ("legacy", "new", "flash")


class Float32GroupNorm(nn.GroupNorm):
    """Group normalisation with 32 groups, in float32 at least; the result has the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(wide_dtype(x.dtype))).to(x.dtype)


class Downsample(nn.Module):
    """Downsampling by 2: a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = InvariantConv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = InvariantConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2."""
    return F.interpolate(x, scale_factor=2)


def halve(x: Tensor) -> Tensor:
    """Downsampling by 2: the mean of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


#: Resampling of a residual block, applied to both of its paths.
RESAMPLERS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "up": double,
    "down": halve,
    None: lambda x: x,
}


class ResBlock(nn.Module):
    """Residual block, modulated by the embedding, with optional resampling of both paths."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        emb_channels: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.scale_shift = scale_shift
        self.resample = RESAMPLERS[resample]
        self.in_layers = nn.Sequential(
            Float32GroupNorm(in_channels),
            nn.SiLU(),
            InvariantConv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), InvariantLinear(emb_channels, out_channels * (2 if scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            Float32GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            InvariantConv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            InvariantConv2d(in_channels, out_channels, 1)
            if out_channels != in_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        added = self.emb_layers(emb).to(h.dtype)[..., None, None]
        if self.scale_shift:
            scale, shift = added.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + added)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over pixels, added to its input; ``layout`` is one of ATTENTIONS."""

    def __init__(
        self, channels: int, *, num_heads: int, num_head_channels: int | None, layout: str
    ) -> None:
        super().__init__()
        self.heads = heads(channels, num_heads, num_head_channels)
        self.legacy = layout == "legacy"
        conv = nn.Conv2d if layout == "flash" else nn.Conv1d
        self.norm = Float32GroupNorm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).mT  # (B, N, C)
        q, k, v = split(pointwise(self.qkv, tokens), self.heads, legacy=self.legacy)
        h = pointwise(self.proj_out, merge(attention(q, k, v)))
        return x + h.mT.reshape(x.shape)


class AttentionPool(nn.Module):
    """Attention pooling as in CLIP: the mean over pixels attends to itself and to the pixels."""

    def __init__(
        self, side: int, channels: int, outputs: int, num_heads: int, num_head_channels: int | None
    ) -> None:
        super().__init__()
        self.heads = heads(channels, num_heads, num_head_channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(-1, keepdim=True), x], dim=-1) + self.positional_embedding
        q, k, v = split(pointwise(self.qkv_proj, x.mT), self.heads, legacy=False)
        pooled = merge(attention(q[:, :, :1], k, v))  # the query of the mean alone
        return pointwise(self.c_proj, pooled)[:, 0]


def heads(channels: int, num_heads: int, num_head_channels: int | None) -> int:
    """Number of attention heads of a block, from ``num_head_channels`` if it is given.

    Raises UserError if the channels are not divisible.
    """
    if channels % (num_head_channels or num_heads):
        wrong = (
            f"heads of {num_head_channels} channels" if num_head_channels else f"{num_heads} heads"
        )
        raise UserError(
            f"{wrong} cannot share attention over {channels} channels; give the network's own "
            "num_head_channels or num_heads in its config"
        )
    return channels // num_head_channels if num_head_channels else num_heads


def pointwise(conv: nn.Conv1d | nn.Conv2d, tokens: Tensor) -> Tensor:
    """A convolution of kernel size 1, one- or two-dimensional, on tokens (B, N, C)."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def split(qkv: Tensor, heads: int, legacy: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, heads, N, c) of (B, N, 3C)."""
    order, axis = ((heads, 3), 3) if legacy else ((3, heads), 2)
    return tuple(part.transpose(1, 2) for part in qkv.unflatten(2, (*order, -1)).unbind(axis))


def merge(parts: Tensor) -> Tensor:
    """(B, heads, N, c) -> (B, N, C)."""
    return parts.transpose(1, 2).flatten(2)


class Block(nn.Sequential):
    """A sequence of layers; residual blocks also receive the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
