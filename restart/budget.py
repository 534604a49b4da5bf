"""Every Restart plan that spends a budget of network evaluations exactly.

Published tables end at 39 NFE.  Below that nobody knows which plan is best, so this lists the
sensible ones in a fixed order and leaves the choice to whoever can measure them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from restart.build import restart_plan
from restart.intervals import Interval
from restart.plan import Jump, Plan
from restart.tables import published_grid
from runtime.errors import UserError
from solvers.driver import planned_nfe
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.rules import AdamsBashforth


class Walk(NamedTuple):
    """How the main grid is walked."""

    solver: str
    afs: bool = False
    zero: bool = False  #: append the final 0, as published; it costs one evaluation at sigma_min

    def grid(self, nodes: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
        if self.zero:
            return published_grid(nodes, sigma_min, sigma_max, rho)
        return get_grid("polynomial", nodes, sigma_min, sigma_max, rho)

    def label(self, nodes: int) -> str:
        return f"{self.solver}({nodes}{'+0' if self.zero else ''}){' afs' if self.afs else ''}"


#: (t_min, t_max): the published CIFAR-10 interval, and wider, higher ones for coarse grids.
INTERVALS = ((0.06, 0.30), (0.30, 1.09), (1.09, 5.0))

#: Main walk and restart solver: Restart as published, then what is strong at few evaluations.
#: Euler is left out: iPNDM spends the same evaluations better, and its one-step walk is Euler.
WALKS = (
    (Walk("heun", zero=True), "heun"),
    (Walk("heun", afs=True), "heun"),
    (Walk("ipndm", afs=True), "heun"),
    (Walk("ipndm", afs=True), "ipndm"),
)


@dataclass(frozen=True)
class Candidate:
    """One way to spend the budget."""

    label: str  #: ``ipndm(5) afs | 2 x ipndm(2) 0.17..1.09``: nodes in brackets, levels at the end
    plan: Plan


def candidates(
    budget: int,
    sigma_min: float,
    sigma_max: float,
    *,
    rho: float = 7.0,
    cost: int = 1,
    intervals: Sequence[tuple[float, float]] = INTERVALS,
    walks: Sequence[tuple[Walk, str]] = WALKS,
) -> Iterator[Candidate]:
    """Restart plans of one interval whose NFE is ``budget``, each once, always in this order.

    Grids are polynomial with exponent ``rho``; ``cost`` is the denoiser's (2 under classifier-free
    guidance).  A main grid has at least one node between its ends, save in the published form.
    Intervals that lie outside the grid or collapse on it are left out.
    """
    seen: set[tuple] = set()
    for walk, restart_name in walks:
        main_solver, restart_solver = make_solver(walk.solver), make_solver(restart_name)
        per_step = planned_nfe(restart_solver, (2.0, 1.0), cost=cost)
        for n_main in range(2 if walk.zero else 3, budget + 3):
            main = walk.grid(n_main, sigma_min, sigma_max, rho)
            left = budget - planned_nfe(main_solver, main, afs=walk.afs, cost=cost)
            for k, n_restart in _descents(left, per_step):
                for t_min, t_max in intervals:
                    interval = Interval(n_restart, k, t_min, t_max)
                    try:
                        plan = restart_plan(
                            main, [interval], main_solver, restart_solver, afs=walk.afs, rho=rho
                        )
                    except UserError:  # outside this grid, or nothing left of it after snapping
                        continue
                    signature = _signature(plan)
                    if signature not in seen:
                        seen.add(signature)
                        inner = f"{k} x {restart_name}({n_restart}) {_levels(plan)}"
                        yield Candidate(f"{walk.label(n_main)} | {inner}", plan)


def _descents(nfe: int, per_step: int) -> list[tuple[int, int]]:
    """All (K, N_restart) with ``K (N_restart - 1) per_step == nfe``."""
    if nfe < per_step or nfe % per_step:
        return []
    steps = nfe // per_step
    return [(k, steps // k + 1) for k in range(1, steps + 1) if steps % k == 0]


def _levels(plan: Plan) -> str:
    jump = next(part for part in plan if isinstance(part, Jump))
    return f"{jump.t_from:.2g}..{jump.t_to:.3g}"


def _signature(plan: Plan) -> tuple:
    """Equal for plans that compute the same: a walk of n intervals has an order of at most n.

    The walks say it all; jumps only join their ends.
    """
    parts: list[tuple] = []
    for part in plan:
        if isinstance(part, Jump):
            continue
        solver = part.solver
        if isinstance(solver, AdamsBashforth):
            solver = replace(solver, max_order=min(solver.max_order, len(part.ts) - 1))
        parts.append((solver, part.afs, tuple(part.ts.tolist())))
    return tuple(parts)
