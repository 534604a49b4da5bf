"""Every Restart plan that spends a budget of network evaluations exactly.

Published tables end at 39 NFE.  Below that nobody knows which plan is best, so this lists the
sensible ones in a fixed order and leaves the choice to whoever can measure them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor

from plans.plan import Jump, Plan
from restart.build import restart_plan
from restart.intervals import Interval, check_interval
from restart.tables import published_grid
from runtime.errors import UserError
from solvers.driver import planned_nfe
from solvers.grids import get_grid
from solvers.registry import NEEDS_GUIDE, SOLVERS, make_solver
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
    options: dict[str, Any]  #: of ``sample.py --sampler=restart``, under their names: the same plan


def candidates(
    budget: int,
    sigma_min: float,
    sigma_max: float,
    *,
    rho: float = 7.0,
    cost: int = 1,
    intervals: Sequence[tuple[float, float]] = INTERVALS,
    walks: Sequence[tuple[Walk, str]] = WALKS,
    most: int = 1,
) -> Iterator[Candidate]:
    """Restart plans whose NFE is ``budget``, each once, always in this order.

    A plan has 1 to ``most`` of the ``intervals``.  Grids are polynomial with exponent ``rho``;
    ``cost`` is the denoiser's (2 under classifier-free guidance).  A main grid has at least one
    node between its ends, save in the published form.  Intervals that lie outside the grid or
    collapse on it, and pairs that restart at one node, are left out.
    """
    seen: set[tuple] = set()
    for walk, restart_name in walks:
        main_solver, restart_solver = make_solver(walk.solver), make_solver(restart_name)
        per_step = planned_nfe(restart_solver, (2.0, 1.0), cost=cost)
        for n_main in range(2 if walk.zero else 3, budget + 3):
            main = walk.grid(n_main, sigma_min, sigma_max, rho)
            left = budget - planned_nfe(main_solver, main, afs=walk.afs, cost=cost)
            for chosen in _restarts(left, per_step, intervals, most):
                try:
                    plan = restart_plan(
                        main, chosen, main_solver, restart_solver, afs=walk.afs, rho=rho
                    )
                except UserError:  # outside this grid, or nothing left of it after snapping
                    continue
                signature = _signature(plan)
                if signature in seen:
                    continue
                seen.add(signature)
                yield _candidate(walk, n_main, restart_name, chosen, plan)


def parse_intervals(text: str) -> list[tuple[float, float]]:
    """``0.06:0.3,1.09:5`` -> [(0.06, 0.3), (1.09, 5.0)]; UserError for anything else."""
    found: list[tuple[float, float]] = []
    for part in filter(None, text.split(",")):
        try:
            low, high = (float(level) for level in part.split(":"))
        except ValueError:
            raise UserError(
                f"the interval {part!r} is not of the form T_MIN:T_MAX, such as 0.06:0.3"
            ) from None
        check_interval(len(found), Interval(2, 1, low, high))
        found.append((low, high))
    if not found:
        raise UserError(f"{text!r} names no interval: give some, such as 0.06:0.3,1.09:5")
    return found


def parse_walks(text: str) -> list[tuple[Walk, str]]:
    """``heun+0/heun,ipndm+afs/ipndm`` -> what walks the main grid, and how, and the restarts.

    ``+0`` appends the final 0, ``+afs`` makes the first slope analytic.  UserError for others.
    """
    known = [name for name in SOLVERS if name not in NEEDS_GUIDE]
    found: list[tuple[Walk, str]] = []
    for part in filter(None, text.split(",")):
        form = re.fullmatch(r"(\w+)((?:\+0|\+afs)*)/(\w+)", part)
        if form is None or form[1] not in known or form[3] not in known:
            raise UserError(
                f"the walk {part!r} is not of the form MAIN[+0][+afs]/RESTART, such as "
                f"heun+0/heun, of the solvers {', '.join(known)}"
            )
        found.append((Walk(form[1], "+afs" in form[2], "+0" in form[2]), form[3]))
    if not found:
        raise UserError(f"{text!r} names no walk: give some, such as heun+0/heun,ipndm+afs/ipndm")
    return found


def _restarts(
    nfe: int, per_step: int, levels: Sequence[tuple[float, float]], most: int
) -> Iterator[list[Interval]]:
    """All restarts at up to ``most`` of the ``levels`` that spend ``nfe``."""
    if nfe < per_step or nfe % per_step:
        return
    for count in range(1, most + 1):
        for descents in _descents(nfe // per_step, count):
            for chosen in combinations(levels, count):
                yield [Interval(n, k, *at) for (k, n), at in zip(descents, chosen, strict=True)]


def _descents(steps: int, count: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """All ``count`` pairs (K, N_restart) with ``sum K (N_restart - 1) == steps``."""
    if not count:
        yield from [()] * (steps == 0)
        return
    for own in range(1, steps + 1) if count > 1 else (steps,):
        for k in range(1, own + 1):
            if own % k == 0:
                for others in _descents(steps - own, count - 1):
                    yield ((k, own // k + 1), *others)


def _candidate(
    walk: Walk, n_main: int, solver: str, chosen: Sequence[Interval], plan: Plan
) -> Candidate:
    options: dict[str, Any] = {"main_solver": walk.solver, "restart_solver": solver}
    options |= {"num_steps": n_main, "afs": walk.afs, "final_zero": walk.zero}
    options["restart_info"] = {str(i): list(astuple(at)) for i, at in enumerate(chosen)}
    jumps = {p.name[1]: p for p in plan if isinstance(p, Jump)}  # one of each, highest first
    below = ", ".join(
        f"{chosen[i].k} x {solver}({chosen[i].n_restart}) {jump.t_from:.2g}..{jump.t_to:g}"
        for i, jump in jumps.items()
    )
    return Candidate(f"{walk.label(n_main)} | {below}", plan, options)


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
