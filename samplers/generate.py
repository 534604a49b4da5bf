"""Sampling: a generator of batches of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from denoisers.batch import SeededBatch
from denoisers.conditions import Conditions
from denoisers.protocol import Model
from plans.plan import plan_times, visit_plan
from runtime.errors import UserError
from runtime.log import note_once
from samplers.graph import GraphedWalk, Record, has_graph
from samplers.sampler import Sampler
from solvers.types import Trajectory


class SampleBatch(NamedTuple):
    """The samples of a batch of seeds."""

    seeds: tuple[int, ...]
    x: Tensor  #: (B, C, H, W), the final states
    nfe: int  #: metered network evaluations per image
    images: Tensor  #: ``x`` decoded: (B, 3, H, W) in [-1, 1]
    trajectory: Trajectory | None  #: every state, decoded, with ``keep_trajectory``


def generate(
    sampler: Sampler,
    model: Model,
    seeds: Sequence[int],
    *,
    batch: int,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    conditions: Conditions | None = None,
    keep_trajectory: bool = False,
    watch: Callable[[int, int], object] | None = None,
    record: Record | None = None,
) -> Iterator[SampleBatch]:
    """Yield the images of ``seeds`` in order, at most ``batch`` at a time.

    ``dtype`` is that of the state.  The guidance rate is the sampler's.  All random numbers depend
    on the seed, so an image does not depend on the batch or the process: distribute the seeds with
    ``World.shard``.  ``watch`` is called with the number of every state of a batch and their total.
    A note says if the sampler's student was trained on other weights than the model's.

    With ``record`` all batches have one shape, for which a network may be compiled: the last one is
    filled up, and what fills it is dropped.  Walks that have a graph (`samplers.graph`) are then
    recorded by it and replayed, unless there is a single batch.

    Raises UserError for a batch below 1 or an invalid condition, and RuntimeError if the metered
    NFE is not the planned one.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} is too small: give --batch 1 or more")
    resolved = replace(conditions or Conditions(), guidance_rate=sampler.guidance_rate)
    resolved.check(model.card, seeds)
    check_coupled(sampler, len(seeds), batch)
    device = torch.device(device)
    if sampler.student is not None:
        sampler.student.to(torch.device(device))
        note_once(sampler.student.note_on(model.sha256))
    chunks = [tuple(seeds[i : i + batch]) for i in range(0, len(seeds), batch)]
    several = record is not None and len(chunks) > 1
    graphed = several and not keep_trajectory and has_graph(sampler, model.card)
    sampling = _Sampling(
        sampler,
        model,
        device,
        dtype,
        resolved,
        keep_trajectory,
        watch,
        least=batch if several else 0,
        record=record if graphed else None,
    )
    return map(sampling.batch, chunks)


def check_coupled(sampler: Sampler, images: int, batch: int, processes: int = 1) -> None:
    """Raise UserError if the sampler couples the images of a batch and there are several."""
    if sampler.coupled and (images > batch or processes > 1):
        raise UserError(
            f"--batch_coupled requires all {images} images in one batch: give --batch {images} on "
            "one process, or leave --batch_coupled out"
        )


@dataclass(eq=False)
class _Sampling:
    """What all batches share."""

    sampler: Sampler
    model: Model
    device: torch.device
    dtype: torch.dtype
    conditions: Conditions
    keep: bool
    watch: Callable[[int, int], object] | None
    least: int  #: images in a batch: smaller ones are filled up with their last
    record: Record | None
    graph: GraphedWalk | None = None

    @torch.inference_mode()
    def batch(self, seeds: tuple[int, ...]) -> SampleBatch:
        """The samples of ``seeds``."""
        sampler, model = self.sampler, self.model
        filled = (*seeds, *seeds[-1:] * (self.least - len(seeds)))
        batch = SeededBatch.open(model, self.conditions, filled, self.dtype, self.device)
        meter = batch.meter
        if batch.denoiser.cost != sampler.cost:
            raise UserError(
                f"a call of {model.card.name!r} takes {batch.denoiser.cost} evaluations but the "
                f"plan has {sampler.cost}: check --guidance_rate {sampler.guidance_rate}"
            )
        x = batch.start(sampler.start)
        times = plan_times(sampler.plan)
        kept = [model.decode(x[: len(seeds)])] if self.keep else []
        states = self._states(batch, x)
        for number, x in enumerate(states, 1):
            if self.keep:
                kept.append(model.decode(x[: len(seeds)]))
            if self.watch is not None:
                self.watch(number, len(times) - 1)
        if meter.nfe != sampler.nfe:
            raise RuntimeError(
                f"{sampler.label} used {meter.nfe} NFE instead of the planned {sampler.nfe}: "
                "this is a bug in a segment's nfe()"
            )
        x = x[: len(seeds)]
        if not self.keep:
            return SampleBatch(seeds, x, meter.nfe, model.decode(x), None)
        t = torch.tensor(times, dtype=torch.float64)
        walked = Trajectory(t, torch.stack(kept), meter.nfe)
        return SampleBatch(seeds, x, meter.nfe, kept[-1], walked)

    def _states(self, batch: SeededBatch, x: Tensor) -> Iterator[Tensor]:
        """The states of the plan, or of a graph the last one alone."""
        if self.record is None:
            return visit_plan(self.sampler.plan, batch.meter, x, batch.process)
        if self.graph is None:
            self.graph = GraphedWalk(self.sampler.plan, batch, x, self.record)
        return self.graph(batch.meter, x)
