"""Build plans: Restart around any solver, EDM's stochastic sampler, and DDPM's ancestral one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plans.plan import TIME_TOLERANCE, Jump, Plan, Solve
from restart.intervals import Interval, check_interval
from runtime.errors import UserError
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.types import Guide, Solver


@dataclass(frozen=True)
class _Walker:
    """A solver with what it needs, before it knows its grid."""

    solver: Solver
    guide: Guide | None
    afs: bool


@dataclass(frozen=True)
class _Churn:
    """Before an interval that starts in [low, high]: up to ``(1 + gamma) t`` in noise."""

    gamma: float
    low: float
    high: float
    noise: float

    def active(self, t: float) -> bool:
        return self.gamma > 0 and self.low <= t <= self.high


def restart_plan(
    main_ts: Tensor,
    intervals: Sequence[Interval],
    main_solver: Solver,
    restart_solver: Solver | None = None,
    *,
    main_guide: Guide | None = None,
    restart_guide: Guide | None = None,
    afs: bool = False,
    restart_afs: bool = False,
    S_noise: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    restart_gamma: float = 0.0,
    rho: float = 7.0,
    keep: Tensor | None = None,
) -> Plan:
    """Restart (arXiv:2306.14878, algorithm 1) around a main walk down ``main_ts``.

    ``main_ts`` (T,) decreases and may end in 0.  When the main walk lands on its node nearest to
    an interval's ``t_min``, K times: jump up to ``t_max`` and walk a polynomial grid of
    N_restart nodes (exponent ``rho``) down to that node.  ``restart_solver`` None means Heun.
    ``keep`` holds times that become nodes of the *final* descent of every interval that contains
    them strictly inside.  ``S_*`` are those of EDM's stochastic sampler: on the main walk
    ``gamma = min(S_churn / N, sqrt 2 - 1)``, inside restart descents ``restart_gamma``.  ``afs``
    and ``restart_afs`` make the first slope of the main walk and of each descent analytic.

    Draws are named ``("restart", i, k)``, ``("churn", j)`` (interval j of the main walk) and
    ``("restart", i, k, "churn", j)``, where i counts ``intervals`` as given.
    Raises UserError, naming the interval, where the plan would be nonsense.
    """
    _check_noise(S_noise=S_noise, S_churn=S_churn, restart_gamma=restart_gamma, S_min=S_min)
    _check_noise(S_max=S_max, infinite=True)
    landings = _landings(main_ts, intervals)
    main = _Walker(main_solver, main_guide, afs)
    down = _Walker(restart_solver or make_solver("heun"), restart_guide, restart_afs)
    churn = _Churn(_edm_gamma(main_ts, S_churn), S_min, S_max, S_noise)
    inner = _Churn(restart_gamma, S_min, S_max, S_noise)

    parts: list[Solve | Jump] = []
    at = 0
    for node, i in sorted((node, i) for i, node in enumerate(landings)):
        parts += _walk(main_ts, at, node, main, churn, ("churn",))
        at = node
        t_lo, interval = float(main_ts[node]), intervals[i]
        grid = get_grid("polynomial", interval.n_restart, t_lo, interval.t_max, rho)
        for k in range(interval.k):
            name = ("restart", i, k)
            ts = _with_nodes(grid, keep) if k == interval.k - 1 else grid
            parts.append(Jump(t_lo, interval.t_max, name, S_noise))
            parts += _walk(ts, 0, len(ts) - 1, down, inner, (*name, "churn"))
    parts += _walk(main_ts, at, len(main_ts) - 1, main, churn, ("churn",))
    return tuple(parts)


def edm_plan(
    ts: Tensor,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    solver: Solver | None = None,
    guide: Guide | None = None,
    afs: bool = False,
) -> Plan:
    """EDM's stochastic sampler (arXiv:2206.00364, algorithm 2) down ``ts``; Heun by default.

    Without churn this is the plan of one `Solve`.  Draws are named ``("churn", j)``.
    """
    return restart_plan(
        ts,
        (),
        solver or make_solver("heun"),
        main_guide=guide,
        afs=afs,
        S_noise=S_noise,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
    )


def ddpm_plan(ts: Tensor, eta: float = 1.0) -> Plan:
    """DDPM's ancestral sampler (arXiv:2006.11239, algorithm 2) down ``ts``, which may end in 0.

    Each step from t to s draws from the posterior of ``x_s`` given ``x_t`` and the denoised state
    D, which in sigma time is ``N(D + (s/t)^2 (x_t - D), s^2 (1 - (s/t)^2))`` for every
    variance-preserving process (posterior variance, ``fixed small``).  The mean is one Euler step
    to ``s_down = s^2 / t`` and the variance is ``s^2 - s_down^2``, so the step is that walk and the
    jump from ``s_down`` to s.  ``eta`` scales the noise of the jump, which then starts higher: 0 is
    DDIM, which is Euler's method, and 1 DDPM (arXiv:2010.02502, eq. 12 and 16).

    Draws are named ``("ddpm", j)`` for interval j.  Raises UserError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta:g} is not between 0 (DDIM) and 1 (DDPM)")
    parts: list[Solve | Jump] = []
    for j, (t, s) in enumerate(zip(ts, ts[1:], strict=False)):
        down = s * (1 - eta**2 * (1 - (s / t) ** 2)).sqrt()
        parts.append(Solve(make_solver("euler"), torch.stack([t, down])))
        if down < s:
            parts.append(Jump(float(down), float(s), ("ddpm", j)))
    return tuple(parts)


def _walk(
    ts: Tensor, first: int, last: int, walker: _Walker, churn: _Churn, name: tuple
) -> list[Solve | Jump]:
    """Parts that lead from node ``first`` to node ``last``; intervals without churn stay one walk.

    One walk, not many, so that a multistep solver keeps its history.
    """
    parts: list[Solve | Jump] = []

    def solve(nodes: Tensor, start: int) -> Solve:
        return Solve(walker.solver, nodes, walker.guide, walker.afs and start == 0)

    at = first
    for j in range(first, last):
        t = float(ts[j])
        if not churn.active(t):
            continue
        if j > at:
            parts.append(solve(ts[at : j + 1], at))
        t_hat = t * (1 + churn.gamma)
        parts.append(Jump(t, t_hat, (*name, j), churn.noise))
        parts.append(solve(torch.stack([ts.new_tensor(t_hat), ts[j + 1]]), j))
        at = j + 1
    if last > at:
        parts.append(solve(ts[at : last + 1], at))
    return parts


def _landings(main_ts: Tensor, intervals: Sequence[Interval]) -> list[int]:
    """Index of the main node at which each interval restarts; UserError where it cannot."""
    nodes = main_ts[main_ts > 0]
    top, bottom = float(nodes[0]), float(nodes[-1])
    landings: list[int] = []
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
        if node in landings:
            other = landings.index(node)
            raise UserError(
                f"restart intervals {other} {intervals[other]} and {i} {interval} both restart at "
                f"the grid node {t_lo:g}; use more main nodes or drop one of them"
            )
        landings.append(node)
    return landings


def _with_nodes(grid: Tensor, keep: Tensor | None) -> Tensor:
    """``grid`` and those of ``keep`` strictly inside it, each time once."""
    if keep is None:
        return grid
    keep = keep.to(grid)
    inside = keep[
        (keep > grid[-1] * (1 + TIME_TOLERANCE)) & (keep < grid[0] * (1 - TIME_TOLERANCE))
    ].unique()
    close = torch.isclose(grid[:, None], inside[None], rtol=TIME_TOLERANCE, atol=0.0).any(dim=1)
    return torch.cat([grid[~close], inside]).sort(descending=True).values


def _edm_gamma(ts: Tensor, churn: float) -> float:
    return min(churn / int((ts > 0).sum()), math.sqrt(2) - 1)


def _check_noise(infinite: bool = False, **settings: float) -> None:
    for name, value in settings.items():
        if not value >= 0 or (math.isinf(value) and not infinite):
            raise UserError(f"{name} = {value:g} has to be a number of at least 0")
