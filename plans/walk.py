"""Walks: integrations by one solver over a grid, described independently of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from plans.plan import Jump, Solve
from runtime.errors import UserError
from solvers.registry import make_solver
from solvers.types import Guide, Solver

MOST_CHURN = 1e4  #: S_churn has no more effect from sqrt(2) - 1 times the number of intervals on
MOST_NOISE = 10.0  #: S_noise has published values from 1 to 1.01
MOST_GAMMA = 1.0  #: restart_gamma, a relative increase, is 0.05 where published


@dataclass(frozen=True)
class WalkSpec:
    """A solver, its guide, and whether its first slope is analytic."""

    name: str  #: name of the solver in labels and records
    solver: Solver
    guide: Guide | None = None
    afs: bool = False

    @classmethod
    def by(cls, name: str, afs: bool = False) -> WalkSpec:
        """The classic solver ``name`` with its default options."""
        return cls(name, make_solver(name), afs=afs)

    @classmethod
    def of(cls, walk: WalkSpec | Solver) -> WalkSpec:
        """``walk`` itself, or the specification of a solver without guide and AFS."""
        return walk if isinstance(walk, WalkSpec) else cls(type(walk).__name__, walk)

    def solve(self, nodes: Tensor, first: bool = True) -> Solve:
        """The segment over ``nodes``; only the ``first`` part of a walk has an analytic slope."""
        return Solve(self.solver, nodes, self.guide, self.afs and first)


@dataclass(frozen=True)
class Churn:
    """Settings of EDM's stochastic sampler (arXiv:2206.00364, algorithm 2), as published."""

    S_churn: float = 0.0  #: 0 adds no noise
    S_min: float = 0.0  #: lowest noise level at which noise is added
    S_max: float = math.inf  #: highest noise level at which noise is added
    S_noise: float = 1.0  #: scale of the noise

    def __post_init__(self) -> None:
        check_noise(MOST_CHURN, S_churn=self.S_churn)
        check_noise(MOST_NOISE, S_noise=self.S_noise)
        check_noise(S_min=self.S_min)
        check_noise(S_max=self.S_max, infinite=True)
        if self.S_min > self.S_max:
            raise UserError(
                f"S_min = {self.S_min:g} is above S_max = {self.S_max:g}, with no level between: "
                "exchange them, or give S_churn 0"
            )

    def gamma(self, ts: Tensor) -> float:
        """Relative increase of the noise level in every interval of ``ts``, at most sqrt(2) - 1."""
        return min(self.S_churn / int((ts > 0).sum()), math.sqrt(2) - 1)


def check_noise(most: float = math.inf, infinite: bool = False, **settings: float) -> None:
    """Raise UserError unless every setting is from 0 to ``most``, and finite unless allowed."""
    for name, value in settings.items():
        if not 0 <= value <= most or (math.isinf(value) and not infinite):
            limit = f" and at most {most:g}" if math.isfinite(most) else ""
            raise UserError(f"{name} = {value:g} is invalid; give a number of at least 0{limit}")


def churned_walk(
    walk: WalkSpec, ts: Tensor, first: int, last: int, churn: Churn, gamma: float, name: tuple
) -> list[Solve | Jump]:
    """The segments from node ``first`` of ``ts`` to node ``last``.

    An interval j that starts in ``[S_min, S_max]`` is preceded by a jump to ``(1 + gamma) t`` with
    the draw ``(*name, j)``.  Intervals without a jump stay in one segment, so that a multistep
    solver keeps its history.
    """
    segments: list[Solve | Jump] = []
    at = first
    for j in range(first, last):
        t = float(ts[j])
        if not (gamma > 0 and churn.S_min <= t <= churn.S_max):
            continue
        if j > at:
            segments.append(walk.solve(ts[at : j + 1], first=at == 0))
        t_hat = t * (1 + gamma)
        segments.append(Jump(t, t_hat, (*name, j), churn.S_noise))
        nodes = torch.stack([ts.new_tensor(t_hat), ts[j + 1]])
        segments.append(walk.solve(nodes, first=j == 0))
        at = j + 1
    if last > at:
        segments.append(walk.solve(ts[at : last + 1], first=at == 0))
    return segments
