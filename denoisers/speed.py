"""How long a piece of work will take on this machine: its evaluations, and the time of a few."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from denoisers.batch import SeededBatch
from runtime.dist import World
from runtime.log import note

PROBES = 3  #: timed calls, after one that is not
SHORT = 10_000  #: evaluations below which work is no long work, and no time is estimated


@dataclass(frozen=True)
class Work:
    """What a training is going to spend."""

    forward: int  #: network evaluations of single samples
    gradients: int  #: further evaluations, with a gradient back through each
    disk: int = 0  #: bytes that will be written

    @property
    def is_long(self) -> bool:
        return self.forward + self.gradients >= SHORT

    def __str__(self) -> str:
        backward = f" and {self.gradients:,} with gradients" if self.gradients else ""
        disk = f", {self.disk / 1e6:,.0f} MB on disk" if self.disk else ""
        return f"{self.forward:,} network evaluations{backward}{disk}"


class Speed(NamedTuple):
    """Seconds for the evaluation of a single sample in one process."""

    forward: float
    gradient: float

    def of(self, work: Work, here: World) -> str:
        """The time of ``work`` in all processes, in words."""
        seconds = work.forward * self.forward + work.gradients * self.gradient
        return f"about {_spoken(seconds / here.size)}"


def probe(batch: SeededBatch) -> Speed:
    """Time a few calls with these samples, and as many with gradients."""
    sigma = torch.tensor(min(1.0, batch.card.sigma_max), dtype=torch.float64)
    x, samples = batch.start(sigma), len(batch.noise.seeds) * batch.denoiser.cost

    def forward() -> None:
        with torch.no_grad():
            batch.denoiser(x, sigma)

    def gradient() -> None:
        leaf = x.detach().clone().requires_grad_()
        batch.denoiser(leaf, sigma).x0.sum().backward()

    def seconds(call: Callable[[], None]) -> float:
        call()
        wait_for(batch.device)
        began = time.perf_counter()
        for _ in range(PROBES):
            call()
        wait_for(batch.device)
        return (time.perf_counter() - began) / (PROBES * samples)

    return Speed(seconds(forward), seconds(gradient))


def announce(work: Work, draw: Callable[[], SeededBatch], here: World) -> None:
    """Say on rank 0 what long work will take; ``draw`` gives the batch that is timed."""
    if work.is_long:
        spoken = told(work, draw(), here)  # on every process, which share the machine
        note(spoken if here.is_main else None)


def told(work: Work, batch: SeededBatch, here: World) -> str:
    """The work and its time, which a few calls with ``batch`` tell; on every process."""
    return f"{work}: {probe(batch).of(work, here)} on this machine"


def wait_for(device: torch.device) -> None:
    """Until the work that was handed to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{round(minutes)} min" if minutes < 120 else f"{minutes / 60:.1f} h"
