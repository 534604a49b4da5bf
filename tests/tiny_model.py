"""A model in closed form for ``train.py``, with nothing slow in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoisers.analytic import MixtureDenoiser
from denoisers.cards import Card, cards
from denoisers.registry import ModelSource
from runtime.dist import World
from solvers.types import Denoiser

CLASSES = 3


@dataclass(eq=False)
class TinyModel:
    """Four modes on 3 x 4 x 4 pixels; with classes, every class moves the modes."""

    card: Card
    sha256: str = "0" * 64

    def decode(self, x: Tensor) -> Tensor:
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        generator = torch.Generator().manual_seed(1)
        means = 0.5 * torch.randn(4, *self.card.shape, generator=generator, dtype=torch.float64)
        if labels is None:
            assert not self.card.label_dim
            return MixtureDenoiser(means, 0.25)
        return ByClass([MixtureDenoiser(means + 0.3 * k, 0.25) for k in range(CLASSES)], labels)


@dataclass(eq=False)
class ByClass:
    """Each sample under the denoiser of its class."""

    inner: list[MixtureDenoiser]
    labels: Tensor
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        every = [denoiser(x, sigma) for denoiser in self.inner]
        rows = torch.arange(len(x))
        x0 = torch.stack([each.x0 for each in every])[self.labels, rows]
        return every[0]._replace(x0=x0)


def tiny_model(name: str) -> TinyModel:
    """A name that ends in "-classes" is conditional."""
    card = dataclasses.replace(cards()["cifar10-small"], name=name, resolution=4)
    classes = CLASSES if name.endswith("-classes") else 0
    return TinyModel(dataclasses.replace(card, label_dim=classes))


class TinySource(ModelSource):
    """Stands in for `ModelSource`."""

    def card(self) -> Card:
        return tiny_model(str(self.dataset_name)).card

    @property
    def known_sha256(self) -> str:
        return tiny_model(str(self.dataset_name)).sha256

    def load(self, here: World) -> TinyModel:
        return tiny_model(str(self.dataset_name))
