"""A plan is a sequence of segments: walks down (`Solve`), jumps back up (`Jump`), or others.

A classic solver is the plan of one `Solve`; Restart (Xu et al. 2023, arXiv:2306.14878,
algorithm 1) and EDM's stochastic sampler (Karras et al. 2022, arXiv:2206.00364, algorithm 2)
are plans with jumps.  Plans are data: running one changes nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plans.process import ForwardProcess, Noise, lift_std
from solvers.driver import Meter, integrate, planned_nfe
from solvers.types import Denoiser, Guide, Solver, Trajectory

#: Two times closer than this (relative) are the same point of a plan.
TIME_TOLERANCE = 1e-9


class Segment(Protocol):
    """What takes a state from one noise level to another; ``str`` says in words how."""

    @property
    def start(self) -> float:
        """Noise level at which it begins."""
        ...

    @property
    def times(self) -> list[float]:
        """Noise levels that it visits after its start; the last one is its end."""
        ...

    def nfe(self, cost: int = 1) -> int:
        """Network evaluations that it will spend, at ``cost`` per call."""
        ...

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        """From the state ``x`` (B, C, H, W) at ``start``: the states at ``times``, as they come."""
        ...


@dataclass(frozen=True, eq=False)  # a tensor inside: plans compare by identity
class Solve:
    """A walk of one solver down the grid ``ts``, with a fresh history."""

    solver: Solver
    ts: Tensor  #: (T,) float64 on the CPU, decreasing, may end in 0; T >= 2
    guide: Guide | None = None
    afs: bool = False  #: the first slope is analytic and free

    def __post_init__(self) -> None:
        if self.ts.ndim != 1 or len(self.ts) < 2 or not bool((self.ts[1:] < self.ts[:-1]).all()):
            raise ValueError(f"a walk needs two or more decreasing times, got {self.ts.tolist()}")

    def __str__(self) -> str:
        kind = " (first slope analytic)" if self.afs else ""
        return f"walk {len(self.ts)} nodes {self.ts[0]:g} -> {self.ts[-1]:g}{kind}"

    @property
    def start(self) -> float:
        return float(self.ts[0])

    @property
    def times(self) -> list[float]:
        return self.ts[1:].tolist()

    def nfe(self, cost: int = 1) -> int:
        return planned_nfe(self.solver, self.ts, self.guide, self.afs, cost)

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        yield from integrate(self.solver, meter, x, self.ts, self.guide, self.afs).x[1:]


@dataclass(frozen=True)
class Jump:
    """Noise that lifts the state: ``x + scale sqrt(t_to^2 - t_from^2) z``, ``z`` a named draw.

    With ``scale = 1`` this is the forward process, which keeps the marginal distribution; the
    kernel of the model's process (`plans.process`) makes the noise.
    """

    t_from: float
    t_to: float  #: at least ``t_from``; equal means that the jump does nothing and draws nothing
    name: tuple
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_from <= self.t_to < math.inf:
            raise ValueError(
                f"a jump goes up in noise, got {self.t_from:g} -> {self.t_to:g} ({self.name})"
            )

    @property
    def std(self) -> float:
        """Standard deviation of the added noise."""
        return lift_std(self.t_from, self.t_to, self.scale)

    def __str__(self) -> str:
        return f"jump {self.t_from:g} -> {self.t_to:g} with noise {self.std:g}"

    @property
    def start(self) -> float:
        return self.t_from

    @property
    def times(self) -> list[float]:
        return [self.t_to] if self.t_to > self.t_from else []

    def nfe(self, cost: int = 1) -> int:
        return 0

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        if self.times:
            yield process.lift(x, self.t_from, self.t_to, self.name, self.scale)


Plan = tuple[Solve | Jump, ...]
AnyPlan = tuple[Segment, ...]  #: that may have segments of other kinds


def run_plan(plan: AnyPlan, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Trajectory:
    """Run ``plan`` from the state ``x`` (B, C, H, W) at its first time.

    ``noise`` is the model's forward process, or, for a Gaussian one, a function that returns the
    standard normal draw of a name, shaped like ``x``.  The solver's history ends at every jump.
    Returns all states in the order in which they were visited, the start and the landing point of
    each jump included, so the times go up at jumps; ``nfe`` counts the whole plan.  Raises
    ValueError for a plan with a gap.
    """
    meter = Meter.of(denoiser)
    spent = meter.nfe
    xs = torch.stack([x, *visit_plan(plan, meter, x, noise)])
    return Trajectory(torch.tensor(plan_times(plan), dtype=torch.float64), xs, meter.nfe - spent)


def visit_plan(plan: AnyPlan, meter: Meter, x: Tensor, noise: Noise) -> Iterator[Tensor]:
    """The states of `run_plan` after the start, one by one: a long plan need not keep them all."""
    check_plan(plan)
    process = ForwardProcess.of(noise)
    for segment in plan:
        for state in segment.visit(meter, x, process):
            yield state
            x = state


def plan_times(plan: AnyPlan) -> list[float]:
    """The times of the plan's trajectory, the start included."""
    return [plan[0].start, *(t for segment in plan for t in segment.times)]


def plan_nfe(plan: AnyPlan, cost: int = 1) -> int:
    """Network evaluations that `run_plan` will spend; ``cost`` per call, jumps are free."""
    return sum(segment.nfe(cost) for segment in plan)


def check_plan(plan: AnyPlan) -> None:
    """Raise ValueError unless the plan has segments and each begins where the last one ended."""
    if not plan:
        raise ValueError("a plan needs at least one walk or jump")
    for before, after in zip(plan, plan[1:], strict=False):
        end = before.times[-1] if before.times else before.start
        if not math.isclose(end, after.start, rel_tol=TIME_TOLERANCE):
            raise ValueError(
                f"the plan has a gap: a segment ends at {end:g}, the next begins at {after.start:g}"
            )
