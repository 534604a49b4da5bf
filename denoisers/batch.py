"""A batch of seeds on a model: where it starts, its denoiser, and its noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.conditions import Conditions, StreamName
from denoisers.prior import start
from denoisers.protocol import Model
from plans.process import ForwardProcess
from runtime.noise import Name, SeedNoise
from solvers.driver import Meter
from solvers.types import Denoiser


@dataclass(frozen=True, eq=False)
class SeededBatch:
    """What a sampler needs for a batch of seeds; all randomness is a function of the seeds."""

    card: Card
    noise: SeedNoise
    meter: Meter  #: counts the calls of the denoiser that is bound to these samples
    dtype: torch.dtype  #: of the state
    device: torch.device
    stream: StreamName = ()  #: prefix of the name of every draw; training has its own

    @classmethod
    def open(
        cls,
        model: Model,
        conditions: Conditions,
        seeds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        stream: StreamName = (),
    ) -> SeededBatch:
        """The samples of ``seeds`` under ``conditions``."""
        noise = SeedNoise(seeds)
        denoiser = conditions.bind(model, noise, device, stream)
        return cls(model.card, noise, Meter(denoiser), dtype, device, stream)

    @property
    def denoiser(self) -> Denoiser:
        return self.meter.denoiser

    @property
    def process(self) -> ForwardProcess:
        """The model's forward process with the noise of these samples."""
        return ForwardProcess(self.normal, self.card.pfgmpp)

    def normal(self, name: Name) -> Tensor:
        """The standard normal draw ``name``, (B, *card.shape)."""
        return self.noise.normal(self._named(name), self.card.shape, self.dtype, self.device)

    def start(self, sigma: float | Tensor) -> Tensor:
        """The latents (B, *card.shape) at the noise level ``sigma``."""
        name: Name = self._named("latent") if self.stream else "latent"
        return start(self.card, self.noise, sigma, self.dtype, self.device, name)

    def _named(self, name: Name) -> Name:
        if not self.stream:
            return name
        return (*self.stream, *((name,) if isinstance(name, str) else name))
