"""One training step: a batch is integrated over the student's grid, with one update per interval.

AMED, arXiv:2312.00094, algorithm 1.  Only the predictor's parameters change.  Every micro-batch
keeps its own state in a `MicroBatch`, so that the gradients of micro-batches add up to those of
the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from solvers.driver import Meter, State, advance, substeps_total
from solvers.types import Guide, InsertedNode, Node, Solver
from teachers.supervision import GridTeacher, Supervision, Teacher

#: Infinite gradients are replaced by this bound, NaN by 0, as in the published code (from EDM).
GRADIENT_BOUND = 1e5


class Student(NamedTuple):
    """A solver on its grid, to be guided by the predictor."""

    solver: Solver
    ts: Tensor  #: (N,) noise levels
    afs: bool


class MicroBatch(NamedTuple):
    """A micro-batch: its denoiser, its supervision and its current state."""

    meter: Meter
    supervision: Supervision
    state: State

    @classmethod
    def begin(cls, meter: Meter, supervision: Supervision) -> MicroBatch:
        return cls(meter, supervision, started(supervision, 0))


def started(supervision: Supervision, n: int) -> State:
    """The teacher's state at the start of interval ``n``, with its evaluation if there is one."""
    denoised = supervision.denoised[n] if supervision.denoised else None
    return State(supervision.start[n], denoised=denoised)


def repeated_calls(student: Student, teacher: Teacher) -> int:
    """The student's calls at states that the teacher has evaluated, which are not made again."""
    if not (isinstance(teacher, GridTeacher) and teacher.shares):
        return 0
    intervals = len(student.ts) - 1 if student.solver.kept_nodes == 0 else 1
    return intervals - student.afs


class IntervalResult(NamedTuple):
    """The results of one interval's update; sums over this rank's samples."""

    loss: float  #: this rank's share of sum((student - teacher)^2) / batch
    mid: tuple[float, float, float]  #: sums of r, c, a over this rank's samples
    nonfinite: int  #: number of non-finite gradient entries, which were replaced


def train_batch(
    predictor: nn.Module,
    optimizer: torch.optim.Optimizer,
    student: Student,
    micros: Sequence[MicroBatch],
    batch: int,
    reduce: Callable[[Tensor], object],
) -> list[IntervalResult]:
    """Integrate over all intervals, with one optimizer step each.

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
            after.append(micro._replace(state=next_state(student, micro, out, n, predictor)))
        micros = after
        nonfinite = _reduce_gradients(predictor, reduce)
        optimizer.step()
        results.append(
            IntervalResult(loss, (mids[0].item(), mids[1].item(), mids[2].item()), nonfinite)
        )
    return results


def student_interval(student: Student, micro: MicroBatch, n: int, guide: Guide) -> State:
    """The student's state after interval ``n``, from the current state of the micro-batch."""
    total = substeps_total(student.solver, len(student.ts) - 1, guide)
    return advance(
        student.solver,
        micro.meter,
        micro.state,
        student.ts[n],
        student.ts[n + 1],
        guide,
        total,
        student.afs and n == 0,
    )


def next_state(student: Student, micro: MicroBatch, out: State, n: int, guide: Guide) -> State:
    """The initial state of interval ``n + 1`` after ``out``, detached from the gradient graph.

    A solver without history starts from the teacher's state.  One with history continues from its
    own state and nodes.  If a jump precedes the interval (Restart's flow targets), it starts from
    the teacher's state, with the history of the ODE trajectory through that state.
    """
    supervision = micro.supervision
    if n + 1 >= len(supervision.start):
        return State(out.x.detach())
    if student.solver.kept_nodes == 0:
        return started(supervision, n + 1)
    origin = supervision.origins[n + 1] if supervision.origins else None
    if origin is None:
        return _detached(out)
    new = _from_sigma_max(student, micro, origin, n + 1, guide)
    return new._replace(x=supervision.start[n + 1], order=0)


@torch.no_grad()
def _from_sigma_max(
    student: Student, micro: MicroBatch, x: Tensor, intervals: int, guide: Guide
) -> State:
    """The student's state after the first ``intervals``, from the state ``x`` at sigma_max."""
    state = State(x)
    for n in range(intervals):
        state = student_interval(student, micro._replace(state=state), n, guide)
    return state


def _detached(state: State) -> State:
    def detached(node: Node) -> Node:
        feat = None if node.feat is None else node.feat.detach()
        return Node(node.t.detach(), node.x.detach(), node.x0.detach(), feat)

    return state._replace(x=state.x.detach(), history=tuple(map(detached, state.history)))


def _reduce_gradients(predictor: nn.Module, reduce: Callable[[Tensor], object]) -> int:
    """Sum gradients over ranks in one message; replace and count non-finite entries."""
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
    """Wraps the predictor and sums its outputs for the log."""

    def __init__(self, predictor: Guide) -> None:
        self.predictor = predictor
        self.sums = torch.zeros(3, dtype=torch.float64)

    def __call__(self, node: Node, t_next: Tensor) -> InsertedNode:
        mid = self.predictor(node, t_next)
        sums = torch.stack([torch.as_tensor(v).detach().sum() for v in mid])
        self.sums = self.sums + sums.to("cpu", torch.float64)
        return mid
