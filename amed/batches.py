"""Where the supervised batches of a training come from.

The published scheme has the teacher walk every trajectory on the student's refined grid, once for
each student (`TaughtBatches`).  A teacher that has walked some latents on a fine grid of its own
serves every student (`StoredBatches`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amed.step import MicroBatch
from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import StreamName
from denoisers.protocol import Model
from plans.process import Noise
from runtime.dist import World
from runtime.noise import SeedNoise, shuffled
from solvers.driver import Meter
from solvers.types import Denoiser
from teachers.curves import Curves
from teachers.supervision import Supervision, Teacher, visit_variance
from teachers.trajectories import TrajectoryJob
from teachers.trajectory_files import TRAJECTORIES, TrajectorySet

VARIANCE_SAMPLES, VARIANCE_DRAWS = 4, 4
TRAIN, VARIANCE = "train", "variance"
REPEATS = tuple(f"{VARIANCE}-{k}" for k in range(VARIANCE_DRAWS))
#: First parts of the names of draws in training; draws of samplers have other names.
STREAMS = (TRAIN, VARIANCE, *REPEATS, TRAJECTORIES)


class Batches(Protocol):
    """The supervised samples of a training, each with a number: 0, 1, 2, ..."""

    def micro(self, numbers: Sequence[int]) -> MicroBatch:
        """The samples with these numbers, at the start of the student's grid."""
        ...

    def variance(self, report: int) -> list[float] | None:
        """Variance of a stochastic teacher's states at the student's times; None for others."""
        ...


@dataclass(frozen=True)
class Data:
    """The source of training samples: the model, bound to drawn classes, and named noise.

    A sample depends only on its global number, not on the rank or the micro-batch.  The names of
    its draws are not used by samplers, so no training latent is ever the latent of a sample.
    """

    bind: Callable[[SeedNoise, StreamName], Denoiser]  #: the denoiser of these samples
    card: Card
    seed: int
    dtype: torch.dtype
    device: torch.device

    def draw(self, numbers: Sequence[int], stream: str = TRAIN) -> SeededBatch:
        """The samples with these numbers, with noise from one of the `STREAMS`."""
        noise, name = SeedNoise(numbers), (stream, self.seed)
        meter = Meter(self.bind(noise, name))
        return SeededBatch(self.card, noise, meter, self.dtype, self.device, name)


@dataclass(frozen=True)
class TaughtBatches:
    """A new latent for every sample; the teacher walks it on the student's refined grid."""

    data: Data
    teacher: Teacher

    def micro(self, numbers: Sequence[int]) -> MicroBatch:
        samples = self.data.draw(numbers)
        x = samples.start(samples.card.sigma_max)
        with torch.no_grad():
            supervision = self.teacher.supervise(samples.meter, x, samples.process)
        return MicroBatch.begin(samples.meter, supervision)

    def variance(self, report: int) -> list[float] | None:
        """Over new draws from a few initial states, others in every report."""
        if not self.teacher.stochastic:
            return None
        numbers = range(report * VARIANCE_SAMPLES, (report + 1) * VARIANCE_SAMPLES)
        first = self.data.draw(numbers, VARIANCE)
        x = first.start(first.card.sigma_max)
        processes: list[Noise] = [self.data.draw(numbers, stream).process for stream in REPEATS]
        return visit_variance(self.teacher, first.meter, x, processes).tolist()


@dataclass(frozen=True, eq=False)
class StoredBatches:
    """Samples from a deterministic teacher's trajectories on disk, again and again.

    The states at the student's times are interpolated between the teacher's nodes.
    """

    job: TrajectoryJob
    model: Model
    stored: TrajectorySet  #: at all nodes
    ts: Tensor  #: (N,) the student's noise levels
    here: World

    def micro(self, numbers: Sequence[int]) -> MicroBatch:
        latents = shuffled(numbers, len(self.stored), self.job.options.seed)
        batch = self.stored.read(latents)
        curves = Curves(self.stored.times, batch.x, batch.x0, self.here.device)
        states = torch.stack([curves.at(t) for t in self.ts.tolist()])
        states = states.to(self.job.options.model.state_dtype)
        meter = self.job.draw(self.model, latents, self.here).meter
        return MicroBatch.begin(meter, Supervision(states[:-1], states[1:], nfe=0))

    def variance(self, report: int) -> list[float] | None:
        return None
