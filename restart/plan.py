"""A plan is a sequence of walks down (`Solve`) and jumps back up in noise (`Jump`).

A classic solver is the plan of one `Solve`; Restart (Xu et al. 2023, arXiv:2306.14878,
algorithm 1) and EDM's stochastic sampler (Karras et al. 2022, arXiv:2206.00364, algorithm 2)
are plans with jumps.  Plans are data: running one changes nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.driver import Meter, integrate, planned_nfe
from solvers.types import Denoiser, Guide, Solver, Trajectory

#: Two times closer than this (relative) are the same point of a plan.
TIME_TOLERANCE = 1e-9


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


@dataclass(frozen=True)
class Jump:
    """Noise that lifts the state: ``x + scale sqrt(t_to^2 - t_from^2) z``, ``z`` a named draw.

    With ``scale = 1`` this is the forward process, which keeps the marginal distribution.
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
        return self.scale * math.sqrt((self.t_to - self.t_from) * (self.t_to + self.t_from))


Plan = tuple[Solve | Jump, ...]


def run_plan(
    plan: Plan, denoiser: Denoiser | Meter, x: Tensor, normal: Callable[[tuple], Tensor]
) -> Trajectory:
    """Run ``plan`` from the state ``x`` (B, C, H, W) at its first time.

    ``normal(name)`` returns the standard normal draw of that name, shaped like ``x``.  The
    solver's history ends at every jump.  Returns all states in the order in which they were
    visited, the start and the landing point of each jump included, so the times go up at jumps;
    ``nfe`` counts the whole plan.  Raises ValueError for a plan with a gap.
    """
    check_plan(plan)
    meter = Meter.of(denoiser)
    spent = meter.nfe
    ts = [torch.tensor([_start(plan[0])], dtype=torch.float64)]
    xs = [x[None]]
    for part in plan:
        if isinstance(part, Solve):
            walk = integrate(part.solver, meter, x, part.ts, part.guide, part.afs)
            ts.append(walk.t[1:])
            xs.append(walk.x[1:])
        elif part.t_to > part.t_from:
            ts.append(torch.tensor([part.t_to], dtype=torch.float64))
            xs.append((x + part.std * normal(part.name).to(x))[None])
        x = xs[-1][-1]
    return Trajectory(torch.cat(ts), torch.cat(xs), meter.nfe - spent)


def plan_nfe(plan: Plan, cost: int = 1) -> int:
    """Network evaluations that `run_plan` will spend; ``cost`` per call, jumps are free."""
    return sum(
        planned_nfe(part.solver, part.ts, part.guide, part.afs, cost)
        for part in plan
        if isinstance(part, Solve)
    )


def check_plan(plan: Plan) -> None:
    """Raise ValueError unless the plan has parts and each begins where the last one ended."""
    if not plan:
        raise ValueError("a plan needs at least one walk or jump")
    for before, after in zip(plan, plan[1:], strict=False):
        end, start = _end(before), _start(after)
        if not math.isclose(end, start, rel_tol=TIME_TOLERANCE):
            raise ValueError(
                f"the plan has a gap: a part ends at {end:g}, the next begins at {start:g}"
            )


def _start(part: Solve | Jump) -> float:
    return float(part.ts[0]) if isinstance(part, Solve) else part.t_from


def _end(part: Solve | Jump) -> float:
    return float(part.ts[-1]) if isinstance(part, Solve) else part.t_to
