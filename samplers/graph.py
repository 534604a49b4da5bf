"""A whole walk as one CUDA graph: its hundreds of kernels are launched together.

Launching the kernels of a small network takes longer than running them.  A graph records those of
all K evaluations and of the solver between them once, for one shape of a batch, and replays them on
other latents.  What is drawn or chosen during a walk cannot be recorded, so there are graphs of
plans of solves and tables on networks without conditions; others are walked as always:

* jumps (Restart, churn, `ddpm`), because their noise is drawn on the CPU, by seed;
* chains of PDS and the schedulers of ``diffusers``, which choose steps while they walk;
* learned predictors, which copy noise levels to the device during the walk;
* models with classes, prompts or guidance, whose denoiser is bound anew for every batch;
* families other than EDM's and NCSN++'s, which look up their network's times on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from denoisers.batch import SeededBatch
from denoisers.cards import Card
from plans.plan import AnyPlan, Solve, visit_plan
from plans.table import TableWalk
from samplers.sampler import Sampler
from solvers.driver import Meter

FAMILIES = ("edm", "ncsnpp")  #: whose networks take their times from the state's device
WARM_UPS = 2  #: walks before the recording, in which libraries choose kernels and take memory


class Recording(NamedTuple):
    """Work that was recorded."""

    result: Tensor  #: undefined until the first replay; each replay writes it anew
    replay: Callable[[], None]


#: Records what a function does on a device; the tensors that it uses must stay where they are.
Record = Callable[[Callable[[], Tensor], torch.device], Recording]


def cuda_graph(work: Callable[[], Tensor], device: torch.device) -> Recording:
    """Record ``work`` as a CUDA graph; RuntimeError if it waits for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        # other threads, such as a detector's, may go on with theirs
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
    return Recording(result, graph.replay)


def has_graph(sampler: Sampler, card: Card) -> bool:
    """Whether a walk of ``sampler`` is the same work for every batch; see the top of this file."""
    bare = card.family in FAMILIES and not (card.label_dim or card.text)
    return bare and all(
        isinstance(segment, TableWalk) or (isinstance(segment, Solve) and segment.guide is None)
        for segment in sampler.plan
    )


class GraphedWalk:
    """Walks of a plan by replay; the first batch is recorded, and all have its shape."""

    def __init__(self, plan: AnyPlan, first: SeededBatch, x: Tensor, record: Record) -> None:
        self._x = x.clone()
        self._nfe = 0
        self._recording = record(lambda: self._walk(plan, first), x.device)

    def _walk(self, plan: AnyPlan, first: SeededBatch) -> Tensor:
        meter = Meter(first.denoiser)
        *_, final = visit_plan(plan, meter, self._x, first.process)
        self._nfe = meter.nfe
        return final

    def __call__(self, meter: Meter, x: Tensor) -> Iterator[Tensor]:
        """Yield the final state from the latents ``x``, alone; ``meter`` counts the calls.

        Raises ValueError for a batch of another shape, which a graph cannot take.
        """
        if x.shape != self._x.shape:
            raise ValueError(
                f"a graph of batches {tuple(self._x.shape)} was given one of {tuple(x.shape)}: "
                "fill it up, or record another"
            )
        self._x.copy_(x)
        self._recording.replay()
        meter.nfe += self._nfe
        yield self._recording.result.clone()
