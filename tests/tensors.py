"""How far two tensors are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gap(a: Tensor, b: Any) -> float:
    """The largest difference between the entries of ``a`` and ``b``, a tensor or an array."""
    return float((a.detach() - torch.as_tensor(b).detach()).abs().max())
