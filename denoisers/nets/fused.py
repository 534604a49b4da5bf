"""Group normalisation, affine map and SiLU in one step, for networks in bfloat16 on a CPU.

For channels-last input below 32x32 pixels this is about twenty times faster than PyTorch's CPU
kernel.  It also rounds to bfloat16 only once: statistics, scaling and SiLU are in float32 (in
float64 for a float64 input).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from denoisers.precision import wide_dtype

CHUNK = 1 << 20  #: elements processed at a time, so that temporaries stay in the cache


def fused_norm(
    x: Tensor,
    shift: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """``f(gain * norm(x + shift) + offset)``, ``f`` SiLU or the identity, for ``x`` (B, C, H, W).

    ``shift``, ``gain`` and ``offset`` are (B or 1, C) in float32 (float64 for a float64 ``x``).
    The result is channels-last and has the dtype of ``x``.  It can be differentiated once.
    """
    shift = torch.zeros_like(offset) if shift is None else shift
    return _FusedNorm.apply(x, shift, gain, offset, groups, eps, silu)


class _FusedNorm(torch.autograd.Function):
    """Operates on (B, N, C) with N pixels; factors are (B or 1, 1, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        gain: Tensor,
        offset: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.channels_last)
        moments = []
        for part in _parts(x):
            rows = _rows(x[part])
            centre, rstd = _moments(rows, _factor(shift, part), groups, eps)
            moments.append((centre, rstd))
            factor = rstd * _factor(gain, part)
            constant = torch.addcmul(_factor(offset, part), centre, factor, value=-1)
            torch.addcmul(constant, rows, factor, out=rows)
            _write(out[part], F.silu(rows, inplace=True) if silu else rows)
        ctx.save_for_backward(x, gain, offset, *(torch.cat(m) for m in zip(*moments, strict=True)))
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset, centre, rstd = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        vectors = []  # gradients in shift, gain and offset
        for part in _parts(x):
            rows, slope, scale = _rows(x[part]), _rows(grad[part]), _factor(gain, part)
            mid, inverse = centre[part], rstd[part]
            if ctx.silu:
                factor = inverse * scale
                constant = torch.addcmul(_factor(offset, part), mid, factor, value=-1)
                value = torch.addcmul(constant, rows, factor)
                slope = torch.ops.aten.silu_backward(slope, value)
            d_offset = slope.sum(1, keepdim=True)
            d_gain = ((slope * rows).sum(1, keepdim=True) - mid * d_offset) * inverse
            # Without the components along a group's mean and along the normalised group:
            # dx = inverse (scale slope - mean - along unit), unit = inverse (rows - mid).
            mean = _group_mean(d_offset * scale, ctx.groups) / rows.shape[1]
            along = _group_mean(d_gain * scale, ctx.groups) / rows.shape[1] * inverse**2
            torch.addcmul(along * mid - mean * inverse, slope, scale * inverse, out=slope)
            slope.addcmul_(rows, along, value=-1)
            vectors.append((slope.sum(1), d_gain[:, 0], d_offset[:, 0]))
            _write(dx[part], slope)
        return dx, *(torch.cat(v) for v in zip(*vectors, strict=True)), None, None, None


def _parts(x: Tensor) -> Iterator[slice]:
    """Slices of the batch with at most CHUNK elements each."""
    step = max(1, CHUNK // x[0].numel())
    return (slice(i, i + step) for i in range(0, len(x), step))


def _factor(vector: Tensor, part: slice) -> Tensor:
    """(B or 1, C) -> (b or 1, 1, C)."""
    return (vector if len(vector) == 1 else vector[part])[:, None]


def _rows(x: Tensor) -> Tensor:
    """A (B, H*W, C) copy in float32 or float64."""
    return x.permute(0, 2, 3, 1).to(wide_dtype(x.dtype), copy=True).flatten(1, 2)


def _write(out: Tensor, rows: Tensor) -> None:
    out.permute(0, 2, 3, 1).copy_(rows.view(len(out), *out.shape[2:], -1))


def _moments(rows: Tensor, shift: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean minus ``shift``, and 1 / deviation, of ``rows + shift`` over each channel's group.

    Both (B, 1, C), computed from the moments of ``rows`` without forming ``rows + shift``.
    """
    mean = rows.sum(1, keepdim=True).div_(rows.shape[1])
    square = (rows * rows).sum(1, keepdim=True).div_(rows.shape[1])
    square = _group_mean(torch.addcmul(square, shift, 2 * mean + shift), groups)
    mean = _group_mean(mean + shift, groups)
    rstd = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()
    return mean - shift, rstd


def _group_mean(x: Tensor, groups: int) -> Tensor:
    """Replace each channel of (B, 1, C) by the mean over its group."""
    grouped = x.view(len(x), groups, -1)
    return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(x.shape)
