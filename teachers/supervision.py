"""What supervises a student: per interval, the state it starts from and the state it should reach.

The published scheme (AMED, arXiv:2312.00094, algorithm 1) slices one deterministic teacher
trajectory at the student's times.  Restart (arXiv:2306.14878) is stochastic, so it can supervise
in two ways; see `RestartTeacher`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from plans.plan import Plan, run_plan
from plans.process import Noise
from solvers.driver import Meter, integrate
from solvers.oracle import dopri5
from solvers.types import Denoised, Denoiser, Solver, Trajectory


class Supervision(NamedTuple):
    """Targets for a batch on a student's grid of N nodes."""

    start: Tensor  #: (N - 1, B, C, H, W), the teacher's state at the head of each interval
    target: Tensor  #: (N - 1, B, C, H, W), where the interval should end
    nfe: int  #: network evaluations that the teacher spent
    #: Per interval None where the targets so far form one walk, which a student with history may
    #: follow from its own states; where a jump begins another, the state at sigma_max whose ODE
    #: path runs through the start.  Such a student has to have come down that path, or its old
    #: slopes belong to noise that the jump has replaced.  Empty means None everywhere.
    origins: tuple[Tensor | None, ...] = ()


class Teacher(Protocol):
    """Turns a batch of states at sigma_max into supervision."""

    @property
    def stochastic(self) -> bool: ...

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        """The teacher's states at the student's times, (N, B, C, H, W)."""
        ...

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision: ...


@dataclass(frozen=True, eq=False)
class GridTeacher:
    """Any solver on the refined grid, sliced at the student's times; never with AFS."""

    solver: Solver
    fine: Tensor  #: ((M + 1)(N - 1) + 1,) noise levels
    stride: int  #: M + 1
    stochastic: bool = False

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        return integrate(self.solver, denoiser, x, self.fine).x[:: self.stride]

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
        return _chain(self, denoiser, x, noise)


@dataclass(frozen=True, eq=False)
class OracleTeacher:
    """The ODE's own solution by adaptive dopri5; its NFE depends on the model."""

    ts: Tensor  #: (N,) the student's noise levels
    tol: float = 1e-4
    stochastic: bool = False

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        return dopri5(denoiser, x, self.ts, rtol=self.tol, atol=self.tol).x

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
        return _chain(self, denoiser, x, noise)


@dataclass(frozen=True, eq=False)
class RestartTeacher:
    """Restart on the refined grid, as a supervisor of a deterministic student.

    ``flow=False``: the visited states are the targets; a state inside a restart interval belongs
    to the final descent.  A deterministic student then learns their conditional mean.

    ``flow=True``: Restart only *visits*; the target of each interval is a fine walk from the very
    state it visited, which is deterministic and unbiased.
    """

    plan: Plan  #: its final descents pass through every student time
    solver: Solver  #: walks the flow targets
    fine: Tensor  #: ((M + 1)(N - 1) + 1,) noise levels
    stride: int  #: M + 1
    flow: bool = True
    origins: bool = False  #: whether flow targets say where their path begins, for histories
    stochastic: bool = True

    def visit(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Tensor:
        walk = run_plan(self.plan, denoiser, x, noise)
        return walk.x[self._last_visits(walk.t)]

    def supervise(self, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
        if not self.flow:
            return _chain(self, denoiser, x, noise)
        meter = Meter.of(denoiser)
        spent = meter.nfe
        walk = run_plan(self.plan, meter, x, noise)
        last = self._last_visits(walk.t)
        targets, origins = [], []
        for n, head in enumerate(last[:-1]):
            origins.append(self._origin(meter, walk, last, n))
            span = self.fine[n * self.stride : (n + 1) * self.stride + 1]
            if torch.equal(walk.t[head : head + len(span)], span):
                targets.append(walk.x[head + self.stride])  # Restart walked these nodes itself
            else:
                targets.append(integrate(self.solver, meter, walk.x[head], span).x[-1])
        starts = walk.x[last[:-1]]
        nfe = meter.nfe - spent
        return Supervision(starts, torch.stack(targets), nfe, tuple(origins))

    def _origin(self, meter: Meter, walk: Trajectory, last: list[int], n: int) -> Tensor | None:
        """The ODE solved upwards from the start of interval ``n``, if a jump lies before it."""
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
        """Whether a jump reaches any state that a flow target starts from."""
        times = run_plan(self.plan, _CountingDenoiser(), torch.zeros(1, 1, 1, 1), _zero).t
        lift = int(torch.nonzero(times[1:] > times[:-1])[0]) + 1
        return any(i >= lift for i in self._last_visits(times)[:-1])


def _chain(teacher: Teacher, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Supervision:
    meter = Meter.of(denoiser)
    spent = meter.nfe
    states = teacher.visit(meter, x, noise)
    return Supervision(states[:-1], states[1:], meter.nfe - spent)


@torch.no_grad()
def visit_variance(
    teacher: Teacher, denoiser: Denoiser | Meter, x: Tensor, noises: list[Noise]
) -> Tensor:
    """Variance of the teacher's state given the start, per student time: (N,) float64.

    One visit per entry of ``noises`` from the same ``x``; the unbiased variance over the visits,
    averaged over samples and pixels.  This is the part of a trajectory target's loss that no
    deterministic student can remove.
    """
    visits = torch.stack([teacher.visit(denoiser, x, noise) for noise in noises])
    return visits.to("cpu", torch.float64).var(dim=0).flatten(1).mean(1)


def teacher_nfe(teacher: Teacher, cost: int = 1) -> int | None:
    """Network evaluations per supervised sample, counted on a stand-in; None for dopri5."""
    if isinstance(teacher, OracleTeacher):
        return None
    return teacher.supervise(_CountingDenoiser(), torch.zeros(1, 1, 1, 1), _zero).nfe * cost


class _CountingDenoiser:
    """A denoiser that only counts."""

    cost = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(torch.zeros_like(x), None)


def _zero(name: tuple) -> Tensor:
    return torch.zeros(1, 1, 1, 1)
