"""Precision around networks: states keep their dtype, and arithmetic is in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

#: Dtypes of networks, by the names of the flags.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """State and noise level in the wide dtype of ``x``, on the device of ``x``.

    A single level is written there instead of copied: a copy would wait for all work that a GPU
    was given before, and cannot be part of a CUDA graph.
    """
    wide = wide_dtype(x.dtype)
    if sigma.ndim or sigma.device == x.device or (sigma.requires_grad and torch.is_grad_enabled()):
        return x.to(wide), sigma.to(wide).to(x.device)  # cast first: MPS has no float64
    return x.to(wide), torch.full((), float(sigma), dtype=wide, device=x.device)
