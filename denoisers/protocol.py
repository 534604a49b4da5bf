"""What every loaded model offers, and the files that it is loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from denoisers.cards import Card
from solvers.types import Denoiser


@dataclass(frozen=True)
class Files:
    """The weights of a model on this machine."""

    main: Path  #: a file or a folder
    companion: Path | None = None  #: adm: the classifier; ldm: the first stage


class Model(Protocol):
    """A loaded model, before condition and guidance are chosen."""

    @property
    def card(self) -> Card: ...

    @property
    def sha256(self) -> str:
        """Hash of the weights that were loaded."""
        ...

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Denoiser:
        """Fix classes, (B,) int64 or None, guidance and prompts; UserError if they do not fit."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Final states (B, *card.shape) -> images (B, 3, H, W) in [-1, 1]."""
        ...


class TextModel(Model, Protocol):
    """A model with prompts and classifier-free guidance."""

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
        *,
        negative: str | None = None,
    ) -> Denoiser:
        """As `Model.bind`, with a prompt in the place of the empty one under guidance."""
        ...
