"""All Restart plans with exactly a given number of network evaluations.

The published tables end at 39 NFE.  This lists the plans with fewer, in a fixed order, so that
they can be compared by measurement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import Tensor

from plans.plan import Jump, Plan
from plans.walk import WalkSpec
from restart.build import restart_plan
from restart.intervals import Interval, check_interval
from runtime.errors import UserError
from solvers.driver import planned_nfe
from solvers.grids import Grid
from solvers.registry import CLASSIC
from solvers.rules import AdamsBashforth


@dataclass(frozen=True)
class RestartWalks:
    """The solvers of a Restart plan, and whether its main grid ends with 0."""

    main: WalkSpec
    descent: WalkSpec
    final_zero: bool = False  #: True as published; the 0 costs one evaluation at sigma_min

    @classmethod
    def by(
        cls, main: str, descent: str, *, afs: bool = False, final_zero: bool = False
    ) -> RestartWalks:
        return cls(WalkSpec.by(main, afs), WalkSpec.by(descent), final_zero)

    def grid(self, grid: Grid, nodes: int) -> Tensor:
        """The main grid with that many nodes, not counting a final 0."""
        return grid.closed(nodes) if self.final_zero else grid.nodes(nodes)

    def label(self, nodes: int) -> str:
        zero, afs = "+0" if self.final_zero else "", " afs" if self.main.afs else ""
        return f"{self.main.name}({nodes}{zero}){afs}"


RHO = 7.0  #: exponent of the grids, as published

#: (t_min, t_max): the published CIFAR-10 interval, and higher ones for coarse grids.
INTERVALS = ((0.06, 0.30), (0.30, 1.09), (1.09, 5.0))

#: Restart as published, then solvers that are good at few evaluations.  Euler is left out: iPNDM
#: is better at the same cost, and equal to Euler for a single step.
WALKS = (
    RestartWalks.by("heun", "heun", final_zero=True),
    RestartWalks.by("heun", "heun", afs=True),
    RestartWalks.by("ipndm", "heun", afs=True),
    RestartWalks.by("ipndm", "ipndm", afs=True),
)


@dataclass(frozen=True)
class Candidate:
    """A plan within the budget."""

    label: str  #: ``ipndm(5) afs | 2 x ipndm(2) 0.17..1.09``: nodes in brackets, levels last
    plan: Plan
    walks: RestartWalks
    num_steps: int  #: nodes of the main grid
    intervals: tuple[Interval, ...]


def candidates(
    budget: int,
    sigma_min: float,
    sigma_max: float,
    *,
    cost: int = 1,
    intervals: Sequence[tuple[float, float]] = INTERVALS,
    walks: Sequence[RestartWalks] = WALKS,
    most: int = 1,
) -> Iterator[Candidate]:
    """The Restart plans whose NFE is ``budget``, each once, in a fixed order.

    A plan has 1 to ``most`` of the ``intervals``.  Grids are polynomial with exponent `RHO`;
    ``cost`` is the denoiser's (2 under classifier-free guidance).  A main grid has at least one
    node between its ends, except in the published form.  Intervals that do not fit the grid, and
    pairs that restart at the same node, are left out.
    """
    seen: set[tuple] = set()
    grid = Grid("polynomial", None, RHO, sigma_min, sigma_max)
    for walk in walks:
        per_step = planned_nfe(walk.descent.solver, (2.0, 1.0), cost=cost)
        for n_main in range(2 if walk.final_zero else 3, budget + 3):
            nodes = walk.grid(grid, n_main)
            main_nfe = planned_nfe(walk.main.solver, nodes, afs=walk.main.afs, cost=cost)
            for chosen in _restarts(budget - main_nfe, per_step, intervals, most):
                try:
                    plan = restart_plan(nodes, chosen, walk.main, walk.descent, rho=RHO)
                except UserError:  # outside this grid, or empty with t_min at a node
                    continue
                signature = _signature(plan)
                if signature in seen:
                    continue
                seen.add(signature)
                label = f"{walk.label(n_main)} | {_descents_label(walk, chosen, plan)}"
                yield Candidate(label, plan, walk, n_main, tuple(chosen))


def parse_intervals(text: str) -> list[tuple[float, float]]:
    """``0.06:0.3,1.09:5`` -> [(0.06, 0.3), (1.09, 5.0)]; UserError for anything else."""
    intervals: list[tuple[float, float]] = []
    for part in filter(None, text.split(",")):
        try:
            low, high = (float(level) for level in part.split(":"))
        except ValueError:
            raise UserError(
                f"the interval {part!r} is not of the form T_MIN:T_MAX, such as 0.06:0.3"
            ) from None
        check_interval(len(intervals), Interval(2, 1, low, high))
        intervals.append((low, high))
    if not intervals:
        raise UserError(f"{text!r} has no interval: give for example 0.06:0.3,1.09:5")
    return intervals


def parse_walks(text: str) -> list[RestartWalks]:
    """``heun+0/heun,ipndm+afs/ipndm`` -> the solvers of the main walk and of the descents.

    ``+0`` appends a final 0 to the main grid, ``+afs`` makes its first slope analytic.  Raises
    UserError for anything else.
    """
    walks: list[RestartWalks] = []
    for part in filter(None, text.split(",")):
        form = re.fullmatch(r"(\w+)((?:\+0|\+afs)*)/(\w+)", part)
        if form is None or form[1] not in CLASSIC or form[3] not in CLASSIC:
            raise UserError(
                f"the walk {part!r} is not of the form MAIN[+0][+afs]/RESTART, such as "
                f"heun+0/heun, of the solvers {', '.join(CLASSIC)}"
            )
        afs, zero = "+afs" in form[2], "+0" in form[2]
        walks.append(RestartWalks.by(form[1], form[3], afs=afs, final_zero=zero))
    if not walks:
        raise UserError(f"{text!r} has no walk: give for example heun+0/heun,ipndm+afs/ipndm")
    return walks


def _restarts(
    nfe: int, per_step: int, levels: Sequence[tuple[float, float]], most: int
) -> Iterator[list[Interval]]:
    """All choices of restarts at 1 to ``most`` of the ``levels`` with ``nfe`` evaluations."""
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
    for first in range(1, steps + 1) if count > 1 else (steps,):
        for k in range(1, first + 1):
            if first % k == 0:
                for others in _descents(steps - first, count - 1):
                    yield ((k, first // k + 1), *others)


def _descents_label(walks: RestartWalks, chosen: Sequence[Interval], plan: Plan) -> str:
    """``2 x ipndm(2) 0.17..1.09`` for each interval, the highest first."""
    jumps = {jump.name[1]: jump for jump in plan if isinstance(jump, Jump)}
    return ", ".join(
        f"{chosen[i].k} x {walks.descent.name}({chosen[i].n_restart}) "
        f"{jump.t_from:.2g}..{jump.t_to:g}"
        for i, jump in jumps.items()
    )


def _signature(plan: Plan) -> tuple:
    """A key that is equal for plans that compute the same.

    A walk of n intervals has an order of at most n.  The jumps follow from the ends of the walks.
    """
    walks: list[tuple] = []
    for segment in plan:
        if isinstance(segment, Jump):
            continue
        solver = segment.solver
        if isinstance(solver, AdamsBashforth):
            solver = replace(solver, max_order=min(solver.max_order, len(segment.ts) - 1))
        walks.append((solver, segment.afs, tuple(segment.ts.tolist())))
    return tuple(walks)
