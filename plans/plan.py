"""A plan is a sequence of segments: solves down a grid (`Solve`), jumps up (`Jump`), or others.

A classic solver is a plan of one `Solve`.  Restart (Xu et al. 2023, arXiv:2306.14878,
algorithm 1) and EDM's stochastic sampler (Karras et al. 2022, arXiv:2206.00364, algorithm 2)
are plans with jumps.  Plans are immutable data.
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

#: Relative tolerance within which two times of a plan are the same.
TIME_TOLERANCE = 1e-9


class Segment(Protocol):
    """A step of a plan, from one noise level to another; ``str`` describes it."""

    @property
    def start(self) -> float:
        """The initial noise level."""
        ...

    @property
    def times(self) -> list[float]:
        """The noise levels of the states after the initial one; the last one is the end."""
        ...

    def nfe(self, cost: int = 1) -> int:
        """The network evaluations of the segment, ``cost`` per call."""
        ...

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        """Yield the states at ``times``, from the state ``x`` (B, C, H, W) at ``start``."""
        ...


@dataclass(frozen=True, eq=False)  # tensors have no boolean ==, so plans compare by identity
class Solve:
    """Integration by one solver over the grid ``ts``, starting without history."""

    solver: Solver
    ts: Tensor  #: (T,) float64 on the CPU, decreasing, may end in 0; T >= 2
    guide: Guide | None = None
    afs: bool = False  #: the first slope is analytic and costs no evaluation

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
    """Adds noise: ``x + scale sqrt(t_to^2 - t_from^2) z``, where ``z`` is a named draw.

    With ``scale = 1`` this is the forward process, under which the state at ``t_to`` has the right
    marginal distribution.  The noise is drawn by the model's process (`plans.process`).
    """

    t_from: float
    t_to: float  #: at least ``t_from``; if equal, the jump does nothing and draws nothing
    name: tuple
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_from <= self.t_to < math.inf:
            raise ValueError(
                f"a jump must increase noise, got {self.t_from:g} -> {self.t_to:g} ({self.name})"
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
AnyPlan = tuple[Segment, ...]  #: a plan with segments of any kind


def run_plan(plan: AnyPlan, denoiser: Denoiser | Meter, x: Tensor, noise: Noise) -> Trajectory:
    """Run ``plan`` from the state ``x`` (B, C, H, W) at its first time.

    ``noise`` is the model's forward process or, if that is Gaussian, a function that returns the
    standard normal draw of a name, shaped like ``x``.  The solver's history is reset at every jump.
    Returns all states in order, including the initial state and the end of every jump, so the times
    increase at jumps; ``nfe`` counts the whole plan.  Raises ValueError for a plan with a gap.
    """
    meter = Meter.of(denoiser)
    nfe_before = meter.nfe
    xs = torch.stack([x, *visit_plan(plan, meter, x, noise)])
    times = torch.tensor(plan_times(plan), dtype=torch.float64)
    return Trajectory(times, xs, meter.nfe - nfe_before)


def visit_plan(plan: AnyPlan, meter: Meter, x: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Yield the states of `run_plan` after the initial one, without keeping them in memory."""
    check_plan(plan)
    process = ForwardProcess.of(noise)
    for segment in plan:
        for state in segment.visit(meter, x, process):
            yield state
            x = state


def plan_times(plan: AnyPlan) -> list[float]:
    """The times of the plan's trajectory, including the initial one."""
    return [plan[0].start, *(t for segment in plan for t in segment.times)]


def plan_nfe(plan: AnyPlan, cost: int = 1) -> int:
    """The network evaluations that `run_plan` will use, ``cost`` per call; jumps use none."""
    return sum(segment.nfe(cost) for segment in plan)


def check_plan(plan: AnyPlan) -> None:
    """Raise ValueError unless the plan has segments and each begins where the last one ended."""
    if not plan:
        raise ValueError("the plan is empty; give at least one segment")
    for before, after in zip(plan, plan[1:], strict=False):
        end = before.times[-1] if before.times else before.start
        if not math.isclose(end, after.start, rel_tol=TIME_TOLERANCE):
            raise ValueError(
                f"the plan has a gap: a segment ends at {end:g}, the next begins at {after.start:g}"
            )
