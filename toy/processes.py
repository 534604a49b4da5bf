"""The processes that are compared at a number of evaluations.

As in the paper, all of them solve a first-order ODE above t_max, differ only in [t_min, t_max],
and end with the same short solve by Heun's method from t_min.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plans.plan import Plan, Solve, plan_nfe
from plans.stochastic import edm_plan
from plans.walk import Churn
from restart.build import restart_plan
from restart.intervals import Interval
from runtime.errors import UserError
from solvers.grids import get_grid
from solvers.registry import make_solver
from toy.distances import RHO, Process

FAMILIES = ("ode", "sde", "restart", "sde-wide")  #: the paper makes no claim on the last one
HEADS = (4, 8, 12, 24, 36)  #: first-order steps above t_max: any for the ODE, the first two else
GAMMAS = (0.1, 0.2, 0.3, math.sqrt(2) - 1)  #: gammas of the SDE; the last is EDM's maximum
MAIN_STEPS = 2  #: steps of Restart from t_max to t_min before its first jump
DESCENTS = (3, 4, 5)  #: nodes of Restart's descents
TAIL_NODES = 4  #: nodes from t_min to LOWEST, before the final 0
LOWEST = 0.02


@dataclass(frozen=True)
class Levels:
    """The noise levels common to all processes."""

    sigma_max: float = 80.0
    t_max: float = 1.0
    t_min: float = 0.3

    def __post_init__(self) -> None:
        if not LOWEST < self.t_min < self.t_max < self.sigma_max < math.inf:
            raise UserError(
                f"t_min {self.t_min:g}, t_max {self.t_max:g}, sigma_max {self.sigma_max:g} must "
                f"increase in this order and be above {LOWEST:g}"
            )

    def head(self, steps: int) -> Solve:
        """``steps`` Euler steps from sigma_max to t_max."""
        grid = get_grid("polynomial", steps + 1, self.t_max, self.sigma_max, RHO)
        return Solve(make_solver("euler"), grid)

    def main(self, steps: int) -> Tensor:
        """The grid from t_max to 0, with ``steps`` intervals down to the node t_min."""
        upper = get_grid("polynomial", steps + 1, self.t_min, self.t_max, RHO)
        lower = get_grid("polynomial", TAIL_NODES, LOWEST, self.t_min, RHO)
        return torch.cat([upper[:-1], lower, lower.new_zeros(1)])

    def ode(self, steps: int) -> Plan:
        """Heun's method on the grid `main`."""
        return edm_plan(self.main(steps))

    def sde(self, steps: int, gamma: float, wide: bool = False) -> Plan:
        """EDM's stochastic sampler on `main`, which first raises a level t to ``(1 + gamma) t``.

        Raised levels stay below t_max; with ``wide`` t_max itself is raised, to
        ``(1 + gamma) t_max``.  There is no noise from t_min on.
        """
        ts = self.main(steps)
        return edm_plan(
            ts,
            Churn(
                S_churn=gamma * int((ts > 0).sum()),
                S_min=math.nextafter(self.t_min, math.inf),
                S_max=self.t_max if wide else self.t_max / (1 + gamma),
            ),
        )

    def restart(self, n_restart: int, k: int) -> Plan:
        """Heun to t_min, then K jumps to t_max with descents to t_min, then to 0."""
        interval = Interval(n_restart, k, self.t_min, self.t_max)
        return restart_plan(self.main(MAIN_STEPS), [interval], make_solver("heun"))


@dataclass(frozen=True, eq=False)
class SamplerSettings:
    """A process of a family, with its settings as a label."""

    family: str
    label: str  #: ``restart 4 | 3 x 5 nodes``: steps above t_max, then the settings below
    process: Process


def candidates(levels: Levels, budget: int) -> list[SamplerSettings]:
    """All processes with ``budget`` evaluations, in a fixed order.

    Raises UserError if a family has none.
    """
    processes: list[SamplerSettings] = []
    for steps in HEADS:
        head = levels.head(steps)
        for family, settings, body in _bodies(levels, budget - head.nfe()):
            if steps in HEADS[:2] or family == "ode":
                label = f"{family} {steps} | {settings}"
                processes.append(SamplerSettings(family, label, Process(head, body)))
    for family in FAMILIES:
        if not any(c.family == family for c in processes):
            raise UserError(
                f"a budget of {budget} NFE has no '{family}' process; give an odd number of at "
                "least 19"
            )
    return processes


def _bodies(levels: Levels, nfe: int) -> Iterator[tuple[str, str, Plan]]:
    """Family, settings and plan of all processes with ``nfe`` evaluations below t_max."""
    one = plan_nfe(levels.ode(1))
    steps = 1 + _quotient(nfe - one, plan_nfe(levels.ode(2)) - one)
    if steps > 1:
        yield "ode", f"{steps} steps", levels.ode(steps)
        for gamma in GAMMAS:
            yield "sde", f"{steps} steps, gamma {gamma:.2g}", levels.sde(steps, gamma)
        gamma = GAMMAS[-1]
        yield "sde-wide", f"{steps} steps, gamma {gamma:.2g}", levels.sde(steps, gamma, wide=True)
    main = plan_nfe(levels.ode(MAIN_STEPS))
    for n_restart in DESCENTS:
        k = _quotient(nfe - main, plan_nfe(levels.restart(n_restart, 1)) - main)
        if k:
            yield "restart", f"{k} x {n_restart} nodes", levels.restart(n_restart, k)


def _quotient(nfe: int, cost: int) -> int:
    """``nfe / cost`` if that is a positive integer, else 0."""
    return nfe // cost if nfe > 0 and nfe % cost == 0 else 0
