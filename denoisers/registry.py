"""From a name to a model that is ready to be called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from runtime.errors import UserError
from solvers.types import Denoiser

from .cards import Card, cards
from .edm import load_edm

__all__ = ["Card", "Model", "cards", "load_model"]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Model(Protocol):
    """A loaded model, before condition and guidance are chosen."""

    @property
    def card(self) -> Card: ...

    @property
    def sha256(self) -> str:
        """Of the weights that were actually loaded."""
        ...

    def bind(self, labels: Tensor | None = None, guidance_rate: float | None = None) -> Denoiser:
        """Fix classes, (B,) int64 or None, and guidance; UserError if they make no sense."""
        ...


Loader = Callable[[Card, Path | None, torch.device, torch.dtype, Path | None], Model]
FAMILIES: dict[str, Loader] = {"edm": load_edm}


def load_model(
    name: str,
    *,
    device: str | torch.device,
    dtype: str | None = None,
    model_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Model:
    """The model called ``name``, its network in ``dtype`` (default float32) on ``device``.

    ``model_path`` replaces the card's file by another one of the same family; ``cache_dir`` is
    where downloads live.  Raises UserError for an unknown name or dtype, and for weights that are
    missing, altered, or of another network.
    """
    known = cards()
    if name not in known:
        raise UserError(f"unknown dataset '{name}'; known: {', '.join(known)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}")
    card = known[name]
    return FAMILIES[card.family](
        card,
        Path(model_path) if model_path else None,
        torch.device(device),
        DTYPES[dtype or "float32"],
        Path(cache_dir) if cache_dir else None,
    )
