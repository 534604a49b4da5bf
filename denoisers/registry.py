"""From a name to a model that is ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, download
from solvers.types import Denoiser

from .cards import Card, cards
from .edm import load_edm
from .files import Files

__all__ = ["Card", "Model", "ModelSource", "cards", "find_card", "load_model"]

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


Loader = Callable[[Card, Files, torch.device, torch.dtype], Model]
FAMILIES: dict[str, Loader] = {"edm": load_edm}
HUB = "hub:"  #: before the id of a folder on the Hugging Face hub, in a card's ``url``


def find_card(
    name: str, *, model_path: str | Path | None = None, model_family: str | None = None
) -> Card:
    """The card called ``name``, or one made from one's own file under a name of one's own.

    Raises UserError for an unknown name without a ``model_path``, and for a path to nothing.
    """
    known = cards()
    if model_path is not None and not str(model_path).startswith(HUB):
        _own(model_path, "--model_path")
    if name in known:
        return known[name]
    if model_path is None:
        raise UserError(
            f"unknown dataset '{name}'; known: {', '.join(known)}; a model of your own takes any "
            "other name together with --model_path"
        )
    raise UserError(f"{model_path}: own models are not known yet")


def load_model(
    name: str,
    *,
    device: str | torch.device,
    dtype: str | None = None,
    model_path: str | Path | None = None,
    model_family: str | None = None,
    companion_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    world: World | None = None,
) -> Model:
    """The model called ``name``, its network in ``dtype`` (default float32) on ``device``.

    ``model_path`` replaces the card's file, ``companion_path`` its classifier or first stage.  What
    is missing is fetched into ``cache_dir`` by rank 0 of ``world`` while the others wait.  Raises
    UserError for an unknown name or dtype, and for weights that are missing, altered, or of
    another network.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}")
    card = find_card(name, model_path=model_path, model_family=model_family)
    if world is not None and not world.is_main:
        world.barrier()
    files = locate(card, model_path, companion_path, cache_dir)
    if world is not None and world.is_main:
        world.barrier()
    return FAMILIES[card.family](card, files, torch.device(device), DTYPES[dtype or "float32"])


@dataclass(frozen=True)
class ModelSource:
    """The options that say which model, under the names of their flags."""

    dataset_name: str
    model_path: str | None = None
    model_family: str | None = None
    companion_path: str | None = None
    cache_dir: str | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ModelSource:
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def card(self) -> Card:
        """See :func:`find_card`."""
        return find_card(
            self.dataset_name, model_path=self.model_path, model_family=self.model_family
        )

    def load(self, dtype: str | None, world: World) -> Model:
        """See :func:`load_model`."""
        return load_model(
            self.dataset_name,
            device=world.device,
            dtype=dtype,
            model_path=self.model_path,
            model_family=self.model_family,
            companion_path=self.companion_path,
            cache_dir=self.cache_dir,
            world=world,
        )


def locate(
    card: Card,
    model_path: str | Path | None = None,
    companion_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Files:
    """The files of a model: one's own, those that come along, or fetched ones."""
    folder = cache_folder(cache_dir)
    if str(model_path).startswith(HUB):
        main: Path | None = _fetch(str(model_path), folder, None)
    else:
        main = _own(model_path, "--model_path") or card.bundled
    companion = _own(companion_path, "--companion_path")
    if companion is not None and card.companion is None:
        raise UserError(
            f"{card.name!r} has no second file: leave --companion_path {companion_path} out"
        )
    if main is None:
        main = _fetch(card.url or "", folder, card.sha256)
    if companion is None and card.companion is not None:
        companion = _fetch(card.companion["url"] or "", folder, card.companion["sha256"])
    return Files(main, companion)


def _own(path: str | Path | None, flag: str) -> Path | None:
    if path is None:
        return None
    if not Path(path).exists():
        raise UserError(f"no weights at {path}; check {flag}")
    return Path(path)


def _fetch(url: str, folder: Path, sha256: str | None) -> Path:
    if not url.startswith(HUB):
        return download(url, folder, sha256)
    from .pipelines import fetch_pipeline  # the extra [diffusion]

    return fetch_pipeline(url.removeprefix(HUB), folder)
