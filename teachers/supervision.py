"""Supervision of a student: for every interval, its initial state and its target.

The published scheme (AMED, arXiv:2312.00094, algorithm 1) takes one deterministic teacher
trajectory at the student's times.  Restart (arXiv:2306.14878) is stochastic, so it can supervise
in two ways; see `RestartTeacher`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from plans.plan import Plan, plan_times, run_plan
from plans.process import Noise
from solvers.driver import Meter, integrate, substeps_total
from solvers.oracle import dopri5
from solvers.types import Denoised, Denoiser, Solver, Trajectory


class Supervision(NamedTuple):
    """Targets for a batch on a student's grid of N nodes."""

    start: Tensor  #: (N - 1, B, C, H, W), the teacher's state at the start of each interval
    target: Tensor  #: (N - 1, B, C, H, W), the target at the end of each interval
    nfe: int  #: network evaluations of the teacher
    #: Per interval, None if there is no jump since the start of the previous one, so that a student
    #: with history can continue from its own states.  After a jump, the state at sigma_max whose
    #: ODE trajectory passes through the start: the student has to follow that trajectory, because
    #: its earlier slopes belong to noise that the jump replaced.  Empty means None everywhere.
    origins: tuple[Tensor | None, ...] = ()
    #: Per interval, what the network gave at the start; empty if the teacher does not share it.
    denoised: tuple[Denoised, ...] = ()


class Teacher(Protocol):
    """Computes the supervision of a batch of states at sigma_max."""

    @property
    def stochastic(self) -> bool: ...

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        """The teacher's states at the student's times, (N, B, C, H, W)."""
        ...

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision: ...


class Recorder:
    """A denoiser that keeps what it gave in the calls with these numbers, from 0."""

    def __init__(self, inner: Denoiser, calls: Collection[int]) -> None:
        self.kept: list[Denoised] = []
        self._inner, self._calls, self._count = inner, calls, 0

    @property
    def cost(self) -> int:
        return self._inner.cost

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        denoised = self._inner(x, sigma)
        if self._count in self._calls:
            self.kept.append(denoised)
        self._count += 1
        return denoised


@dataclass(frozen=True, eq=False)
class GridTeacher:
    """Any solver on the refined grid, evaluated at the student's times; without AFS."""

    solver: Solver
    fine: Tensor  #: ((M + 1)(N - 1) + 1,) noise levels
    stride: int  #: M + 1
    stochastic: bool = False
    shares: bool = False  #: whether the student gets the evaluations at its own times

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        return integrate(self.solver, denoiser, x, self.fine).x[:: self.stride]

    @property
    def calls(self) -> range:
        """The numbers, from 0, of the calls at the student's times; the last one has none."""
        per_node = substeps_total(self.solver, 1, None)
        return range(0, (len(self.fine) - 1) * per_node, self.stride * per_node)

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
        if not self.shares:
            return _trajectory_targets(self, denoiser, x, noise)
        meter = Meter.of(denoiser)
        recorder = Recorder(meter.denoiser, self.calls)
        supervision = _trajectory_targets(self, recorder, x, noise)
        meter.nfe += supervision.nfe
        return supervision._replace(denoised=tuple(recorder.kept))


@dataclass(frozen=True, eq=False)
class OracleTeacher:
    """The solution of the ODE by adaptive dopri5; its NFE depends on the model."""

    ts: Tensor  #: (N,) the student's noise levels
    tol: float = 1e-4
    stochastic: bool = False

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        return dopri5(denoiser, x, self.ts, rtol=self.tol, atol=self.tol).x

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
        return _trajectory_targets(self, denoiser, x, noise)


@dataclass(frozen=True, eq=False)
class RestartTeacher:
    """Restart on the refined grid, as the teacher of a deterministic student.

    ``flow=False``: the visited states are the targets; inside a restart interval, those of the
    final descent.  A deterministic student then learns their conditional mean.

    ``flow=True``: Restart only provides the initial state of each interval.  The target is the
    solution of the ODE on the fine grid from that state, which is deterministic and unbiased.
    """

    plan: Plan  #: its final descents pass through every student time
    solver: Solver  #: solves for the flow targets
    fine: Tensor  #: ((M + 1)(N - 1) + 1,) noise levels
    stride: int  #: M + 1
    flow: bool = True
    origins: bool = False  #: whether to compute `Supervision.origins`, for students with history
    stochastic: bool = True

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        walk = run_plan(self.plan, denoiser, x, noise)
        return walk.x[self._last_visits(walk.t)]

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
        if not self.flow:
            return _trajectory_targets(self, denoiser, x, noise)
        meter = Meter.of(denoiser)
        nfe_before = meter.nfe
        walk = run_plan(self.plan, meter, x, noise)
        last = self._last_visits(walk.t)
        targets, origins = [], []
        for n, start in enumerate(last[:-1]):
            origins.append(self._origin(meter, walk, last, n))
            span = self.fine[n * self.stride : (n + 1) * self.stride + 1]
            if torch.equal(walk.t[start : start + len(span)], span):
                targets.append(walk.x[start + self.stride])  # already computed by Restart
            else:
                targets.append(integrate(self.solver, meter, walk.x[start], span).x[-1])
        starts = walk.x[last[:-1]]
        nfe = meter.nfe - nfe_before
        return Supervision(starts, torch.stack(targets), nfe, tuple(origins))

    def _origin(self, meter: Meter, walk: Trajectory, last: list[int], n: int) -> Tensor | None:
        """The ODE solved backwards from the start of interval ``n``, if a jump precedes it."""
        if not self.origins or n == 0:
            return None
        since = walk.t[last[n - 1] : last[n] + 1]
        if bool((since[1:] < since[:-1]).all()):
            return None
        upwards = self.fine[: n * self.stride + 1].flip(0)
        return integrate(self.solver, meter, walk.x[last[n]], upwards).x[-1]

    def _last_visits(self, times: Tensor) -> list[int]:
        return [int(torch.nonzero(times == t)[-1]) for t in self.fine[:: self.stride]]

    @property
    def changes_starts(self) -> bool:
        """Whether a jump affects the initial state of any interval."""
        times = torch.tensor(plan_times(self.plan), dtype=torch.float64)
        jump = int(torch.nonzero(times[1:] > times[:-1])[0]) + 1
        return any(i >= jump for i in self._last_visits(times)[:-1])


def _trajectory_targets(
    teacher: Teacher, denoiser: Denoiser | Meter, x: Tensor, noise: Noise
) -> Supervision:
    """The teacher's states at the student's times, each the target of the one before it."""
    meter = Meter.of(denoiser)
    nfe_before = meter.nfe
    states = teacher.visit(meter, x, noise)
    return Supervision(states[:-1], states[1:], meter.nfe - nfe_before)


@torch.no_grad()
def visit_variance(
    teacher: Teacher, denoiser: Denoiser | Meter, x: Tensor, noises: list[Noise]
) -> Tensor:
    """Variance of the teacher's state given the initial state, per student time: (N,) float64.

    This is the unbiased variance over one visit per entry of ``noises`` from the same ``x``,
    averaged over samples and pixels: the part of the loss on trajectory targets that no
    deterministic student can remove.
    """
    visits = torch.stack([teacher.visit(denoiser, x, noise) for noise in noises])
    return visits.to("cpu", torch.float64).var(dim=0).flatten(1).mean(1)


def teacher_nfe(teacher: Teacher, cost: int = 1) -> int | None:
    """Network evaluations per supervised sample, counted with a dummy; None for dopri5."""
    if isinstance(teacher, OracleTeacher):
        return None
    return teacher.supervise(_CountingDenoiser(), torch.zeros(1, 1, 1, 1), _zero).nfe * cost


def visit_nfe(teacher: Teacher, cost: int = 1) -> int:
    """Network evaluations of one entry of `visit_variance` per sample, counted with a dummy."""
    meter = Meter(_CountingDenoiser())
    teacher.visit(meter, torch.zeros(1, 1, 1, 1), _zero)
    return meter.nfe * cost


class _CountingDenoiser:
    """A denoiser that returns zeros, for counting evaluations."""

    cost = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(torch.zeros_like(x), None)


def _zero(name: tuple) -> Tensor:
    return torch.zeros(1, 1, 1, 1)
