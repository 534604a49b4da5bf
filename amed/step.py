"""One training step: a batch walks the student's grid once, one update per interval.

AMED, arXiv:2312.00094, algorithm 1.  Pure apart from the predictor's parameters: what a
micro-batch carries from interval to interval is its own `MicroBatch`, so micro-batches never see
each other's history and two accumulated halves are one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from solvers.driver import Meter, State, advance, substeps_total
from solvers.types import Guide, InsertedNode, Node, Solver
from teachers.supervision import Supervision

#: Published replacement of non-finite gradients (NVlabs EDM lineage): bounded, never NaN.
GRADIENT_BOUND = 1e5


class Student(NamedTuple):
    """A solver on its grid, to be driven by the predictor."""

    solver: Solver
    ts: Tensor  #: (N,) noise levels
    afs: bool


class MicroBatch(NamedTuple):
    """A micro-batch: its door to the network, its supervision and where its walk stands."""

    meter: Meter
    supervision: Supervision
    head: State

    @classmethod
    def begin(cls, meter: Meter, supervision: Supervision) -> MicroBatch:
        return cls(meter, supervision, State(supervision.start[0]))


class IntervalResult(NamedTuple):
    """What one interval's update reports; sums over this rank's samples."""

    loss: float  #: this rank's share of sum((student - teacher)^2) / batch
    mid: tuple[float, float, float]  #: sums of r, c, a over this rank's samples
    nonfinite: int  #: gradient entries that had to be replaced


def train_batch(
    predictor: nn.Module,
    optimizer: torch.optim.Optimizer,
    student: Student,
    micros: Sequence[MicroBatch],
    batch: int,
    reduce: Callable[[Tensor], object],
) -> list[IntervalResult]:
    """Walk all intervals with one optimizer step each.

    ``batch`` is the global batch size, ``reduce`` sums a tensor over ranks in place.  The loss of
    an interval is ``sum((x_student - x_teacher)^2) / batch``.
    """
    results = []
    for n in range(len(student.ts) - 1):
        optimizer.zero_grad(set_to_none=True)
        loss, mids, after = 0.0, torch.zeros(3, dtype=torch.float64), []
        for micro in micros:
            recorder = _Recorder(predictor)
            out = student_interval(student, micro, n, recorder)
            error = (out.x - micro.supervision.target[n]).square().sum() / batch
            error.backward()
            loss += error.item()
            mids += recorder.sums
            after.append(micro._replace(head=next_head(student, micro, out, n, predictor)))
        micros = after
        nonfinite = _reduce_gradients(predictor, reduce)
        optimizer.step()
        results.append(
            IntervalResult(loss, (mids[0].item(), mids[1].item(), mids[2].item()), nonfinite)
        )
    return results


def student_interval(student: Student, micro: MicroBatch, n: int, guide: Guide) -> State:
    """The student's walk over interval ``n`` from where the micro-batch stands."""
    total = substeps_total(student.solver, len(student.ts) - 1, guide)
    return advance(
        student.solver,
        micro.meter,
        micro.head,
        student.ts[n],
        student.ts[n + 1],
        guide,
        total,
        student.afs and n == 0,
    )


def next_head(student: Student, micro: MicroBatch, out: State, n: int, guide: Guide) -> State:
    """Where interval ``n + 1`` starts after ``out``, free of the gradient graph.

    A solver without history starts from the teacher.  One with history keeps the nodes that it
    evaluated and goes on from its own state.  Where a jump lies before the interval (Restart's
    flow targets), it starts from the visited state instead, with the history that it would have
    had, had it come down the path of that state.
    """
    supervision = micro.supervision
    if n + 1 >= len(supervision.start):
        return State(out.x.detach())
    if student.solver.max_order == 1:
        return State(supervision.start[n + 1])
    origin = supervision.origins[n + 1] if supervision.origins else None
    if origin is None:
        return _detached(out)
    again = _walk_down(student, micro, origin, n + 1, guide)
    return again._replace(x=supervision.start[n + 1])


@torch.no_grad()
def _walk_down(
    student: Student, micro: MicroBatch, x: Tensor, intervals: int, guide: Guide
) -> State:
    """The student's walk from sigma_max over the first ``intervals``."""
    state = State(x)
    for n in range(intervals):
        state = student_interval(student, micro._replace(head=state), n, guide)
    return state


def _detached(state: State) -> State:
    nodes = (
        Node(
            node.t.detach(),
            node.x.detach(),
            node.x0.detach(),
            None if node.feat is None else node.feat.detach(),
        )
        for node in state.history
    )
    return State(state.x.detach(), tuple(nodes), state.substeps)


def _reduce_gradients(predictor: nn.Module, reduce: Callable[[Tensor], object]) -> int:
    """Sum gradients over ranks in one message; replace and count what is not finite."""
    parameters = [p for p in predictor.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    reduce(flat)
    nonfinite = int((~torch.isfinite(flat)).sum())
    if nonfinite:
        flat = torch.nan_to_num(flat, nan=0.0, posinf=GRADIENT_BOUND, neginf=-GRADIENT_BOUND)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
    return nonfinite


class _Recorder:
    """Passes the predictor's choice through and keeps its sums for the log."""

    def __init__(self, predictor: Guide) -> None:
        self.predictor = predictor
        self.sums = torch.zeros(3, dtype=torch.float64)

    def __call__(self, node: Node, t_next: Tensor) -> InsertedNode:
        mid = self.predictor(node, t_next)
        sums = torch.stack([torch.as_tensor(v).detach().sum() for v in mid])
        self.sums = self.sums + sums.to("cpu", torch.float64)
        return mid
