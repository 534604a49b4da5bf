"""A comparison whose rows take milliseconds: a model in closed form, a few seeds."""

from __future__ import annotations

import torch

from denoisers.analytic import MixtureDenoiser
from denoisers.cards import cards
from evaluation.harness import Harness
from metrics.detectors import load_detector, load_reference
from runtime.dist import World
from solvers.types import Denoiser

CARD = cards()["cifar10-small"]


class MixtureModel:
    """Under the card of the bundled model."""

    card = CARD
    sha256 = "0" * 64

    def decode(self, x):
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        means = 0.5 * torch.randn(4, *CARD.shape, generator=torch.Generator().manual_seed(0))
        return MixtureDenoiser(means, 0.1)


def make_harness(seeds: range = range(12)) -> Harness:
    detector = load_detector("cifar10-small", device="cpu")
    return Harness(
        MixtureModel(),
        detector,
        load_reference("cifar10-small", detector),
        seeds,
        2,
        8,
        torch.float32,
        World(0, 1, torch.device("cpu")),
    )
