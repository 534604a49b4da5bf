"""Building the plan of Restart around any solver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plans.plan import TIME_TOLERANCE, Jump, Plan, Solve
from plans.walk import MOST_GAMMA, Churn, WalkSpec, check_noise, churned_walk
from restart.intervals import Interval, check_interval
from runtime.errors import UserError
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.types import Solver


def restart_plan(
    main_ts: Tensor,
    intervals: Sequence[Interval],
    main: WalkSpec | Solver,
    descent: WalkSpec | Solver | None = None,
    *,
    churn: Churn | None = None,
    restart_gamma: float = 0.0,
    rho: float = 7.0,
    required_nodes: Tensor | None = None,
) -> Plan:
    """Restart (arXiv:2306.14878, algorithm 1) around a main walk over ``main_ts``.

    ``main_ts`` (T,) decreases and may end in 0.  At its node nearest to an interval's ``t_min``
    the main walk is interrupted K times by a jump to ``t_max`` and a descent back to that node,
    over a polynomial grid of N_restart nodes with exponent ``rho``, by default with Heun.
    ``required_nodes`` are times that become nodes of the *final* descent of every interval that
    contains them strictly inside.  ``churn`` is EDM's on the main walk; the descents use
    ``restart_gamma`` as its gamma, and its ``S_noise`` also scales the noise of the jumps.

    Draws are named ``("restart", i, k)``, ``("churn", j)`` (interval j of the main walk) and
    ``("restart", i, k, "churn", j)``, where i is an index into ``intervals``.
    Raises UserError, naming the interval, for intervals that do not fit the grid.
    """
    check_noise(MOST_GAMMA, restart_gamma=restart_gamma)
    churn = churn or Churn()
    main, descent = WalkSpec.of(main), WalkSpec.of(descent or make_solver("heun"))
    gamma = churn.gamma(main_ts)
    restart_nodes = _restart_nodes(main_ts, intervals)
    segments: list[Solve | Jump] = []
    at = 0
    for node, i in sorted((node, i) for i, node in enumerate(restart_nodes)):
        segments += churned_walk(main, main_ts, at, node, churn, gamma, ("churn",))
        at = node
        t_lo, interval = float(main_ts[node]), intervals[i]
        grid = get_grid("polynomial", interval.n_restart, t_lo, interval.t_max, rho)
        grids = [grid] * (interval.k - 1) + [_with_nodes(grid, required_nodes)]
        for k, ts in enumerate(grids):
            name, last = ("restart", i, k), len(ts) - 1
            segments.append(Jump(t_lo, interval.t_max, name, churn.S_noise))
            segments += churned_walk(descent, ts, 0, last, churn, restart_gamma, (*name, "churn"))
    segments += churned_walk(main, main_ts, at, len(main_ts) - 1, churn, gamma, ("churn",))
    return tuple(segments)


def _restart_nodes(main_ts: Tensor, intervals: Sequence[Interval]) -> list[int]:
    """Index of the main node at which each interval restarts; UserError if there is none."""
    nodes = main_ts[main_ts > 0]
    top, bottom = float(nodes[0]), float(nodes[-1])
    indices: list[int] = []
    for i, interval in enumerate(intervals):
        check_interval(i, interval)
        what = f"restart interval {i} {interval}"
        if interval.t_max > top * (1 + TIME_TOLERANCE):
            raise UserError(
                f"{what} lies outside the grid: t_max = {interval.t_max:g} is above its first node "
                f"{top:g}"
            )
        if interval.t_min < bottom * (1 - TIME_TOLERANCE):
            raise UserError(
                f"{what} lies outside the grid: t_min = {interval.t_min:g} is below its last node "
                f"{bottom:g}"
            )
        node = int((nodes - interval.t_min).abs().argmin())
        t_lo = float(nodes[node])
        if t_lo >= interval.t_max:
            raise UserError(
                f"{what}: the grid node nearest to t_min is {t_lo:g}, not below t_max = "
                f"{interval.t_max:g}; use more main nodes or a wider interval"
            )
        if node in indices:
            other = indices.index(node)
            raise UserError(
                f"restart intervals {other} {intervals[other]} and {i} {interval} both restart at "
                f"the grid node {t_lo:g}; use more main nodes or drop one of them"
            )
        indices.append(node)
    return indices


def _with_nodes(grid: Tensor, required: Tensor | None) -> Tensor:
    """``grid`` merged with the times of ``required`` strictly inside it, without repetitions."""
    if required is None:
        return grid
    required = required.to(grid)
    inside = required[
        (required > grid[-1] * (1 + TIME_TOLERANCE)) & (required < grid[0] * (1 - TIME_TOLERANCE))
    ].unique()
    close = torch.isclose(grid[:, None], inside[None], rtol=TIME_TOLERANCE, atol=0.0).any(dim=1)
    return torch.cat([grid[~close], inside]).sort(descending=True).values
