"""Layers shared by the two U-Nets of the EDM family (Karras et al. 2022, arXiv:2206.00364).

Parameter names, and the buffers ``resample_filter`` and ``freqs``, are those of the published
checkpoints.  Some operations are replaced by faster ones that are mathematically the same: a box
filter is a 2x2 mean, or nearest-neighbour upsampling; a 1x1 convolution commutes with the latter,
and a 3x3 convolution is merged with it.  Results agree with the published form up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoisers.nets.batch_invariant import conv2d, linear, upsampling_conv2d
from denoisers.nets.fused import fused_norm
from denoisers.precision import wide_dtype


class Linear(nn.Module):
    """Affine map of the last axis."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups of at least 4 channels."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        *,
        before: Tensor | None = None,
        scale: Tensor | None = None,
        after: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        """``(1 + scale) norm(x + before) + after``, then SiLU if ``silu``; vectors (B or 1, C)."""
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            gain, offset = self.weight[None], self.bias[None]
            if scale is not None:
                gain, offset = gain * (1 + scale), offset * (1 + scale)
            if after is not None:
                offset = offset + after
            return fused_norm(x, before, gain, offset, groups=self.groups, eps=self.eps, silu=silu)
        before, scale, after = (
            None if vector is None else vector.to(x.dtype)[..., None, None]
            for vector in (before, scale, after)
        )
        x = x if before is None else x + before
        x = F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if scale is not None and after is not None:
            x = torch.addcmul(after, x, 1 + scale)
        elif scale is not None:
            x = x * (1 + scale)
        elif after is not None:
            x = x + after
        return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


class Conv2d(nn.Module):
    """Convolution with optional resampling by 2; ``kernel=0`` resamples only.

    Resampling comes first, except with ``conv_first`` (in the downsampling of the residual
    encoder), which pads once for both and resamples last.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[int] = (1, 1),
        conv_first: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.kernel = kernel
        self.up = up
        self.down = down
        self.conv_first = conv_first
        self.box = list(resample_filter) == [1, 1]
        if kernel:
            bound = 1 / math.sqrt(in_channels * kernel**2)
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.zeros(out_channels))
        if up or down:
            # On "meta", where networks are counted, a product would import PyTorch's compiler.
            taps = torch.tensor(resample_filter, dtype=torch.float32, device="cpu")
            kernel2d = torch.outer(taps, taps) / taps.sum() ** 2
            self.register_buffer("resample_filter", kernel2d[None, None])

    def _resample(self, x: Tensor, pad: int) -> Tensor:
        if self.box and pad == 0:
            return F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, taps * 4, groups=channels, stride=2, padding=pad)
        return conv2d(x, taps, groups=channels, stride=2, padding=pad)

    def forward(self, x: Tensor) -> Tensor:
        pad = (self.resample_filter.shape[-1] - 1) // 2 if self.up or self.down else 0
        if self.conv_first and self.down:
            x = conv2d(x, self.weight, padding=self.kernel // 2 + pad)
            return self._resample(x, 0) + self.bias[:, None, None]
        if self.kernel == 1 and self.up and self.box:
            # The same at a quarter of the cost, as upsampling only copies pixels.
            return self._resample(conv2d(x, self.weight, self.bias), pad)
        if self.kernel == 3 and self.up and self.box:
            return upsampling_conv2d(x, self._doubled(), self.bias)
        if self.up or self.down:
            x = self._resample(x, pad)
        return conv2d(x, self.weight, self.bias, padding=self.kernel // 2) if self.kernel else x

    def _doubled(self) -> Tensor:
        """The 4x4 kernel of nearest-neighbour upsampling followed by the 3x3 convolution."""
        wide = wide_dtype(self.weight.dtype)
        weight = self.weight.to(wide).flip(2, 3).transpose(0, 1)
        rows = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
        return (F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))).to(self.weight.dtype)


class PositionalEmbedding(nn.Module):
    """``[cos, sin]`` of the label times ``C/2`` frequencies, decreasing from 1 to 1e-4."""

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.size = channels // 2
        self.last = self.size - int(endpoint)

    def forward(self, x: Tensor) -> Tensor:
        power = torch.arange(self.size, device=x.device).to(x.dtype) / self.last
        angle = torch.outer(x, 1e-4**power)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """``[cos, sin]`` of the label times ``2 pi freqs``, random frequencies stored as a buffer."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2, device="cpu") * scale)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(x, 2 * math.pi * self.freqs.to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention.

    With ``adaptive_scale`` the embedding gives scale and shift of the second normalisation;
    otherwise it is added to the input of that normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[int] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.heads = (num_heads or out_channels // channels_per_head) if attention else 0
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(
            in_channels, out_channels, 3, up=up, down=down, resample_filter=resample_filter
        )
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip: Conv2d | None = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(
                in_channels, out_channels, kernel, up=up, down=down, resample_filter=resample_filter
            )
        if self.heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        skip = x if self.skip is None else self.skip(x)
        x = self.conv0(self.norm0(x, silu=True))
        params = self.affine(emb)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = self.norm1(x, scale=scale, after=shift, silu=True)
        else:
            x = self.norm1(x, before=params, silu=True)
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = x.add_(skip).mul_(self.skip_scale)
        if self.heads:
            x = self.proj(self.attend(self.norm2(x))).add_(x).mul_(self.skip_scale)
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels, (B, C, H, W) -> the same, before the projection."""
        batch, channels, height, width = x.shape
        # The published channel order is (head, channel, q/k/v).  Reordering the small weight makes
        # q, k and v contiguous slices of the result instead of strided copies.
        weight = self.qkv.weight.view(self.heads, -1, 3, channels).permute(2, 0, 1, 3)
        bias = self.qkv.bias.view(self.heads, -1, 3).permute(2, 0, 1).reshape(-1)
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        qkv = F.linear(tokens, weight.reshape(3 * channels, channels), bias)
        q, k, v = qkv.view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v).transpose(1, 2)
        return out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, heads, N, c) tensors."""
    if q.device.type == "cpu" and q.shape[2] <= 256:
        # Twice as fast as the fused kernel on CPUs without matrix units; the scores are small.
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(1 / math.sqrt(q.shape[-1]))
        return torch.matmul(scores.softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v)


def channel_mean(x: Tensor) -> Tensor:
    """Mean over channels, (B, C, h, w) -> (B, h, w), in float32 at least."""
    return x.mean(1, dtype=wide_dtype(x.dtype))


def one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError, listing the known values, unless ``value`` is one of them."""
    if value not in known:
        raise ValueError(f"{what} is '{value}'; known: {', '.join(known)}")
