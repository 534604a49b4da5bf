"""The convergence order of every solver, measured.

The data are Gaussian with a different variance in every pixel, so the probability-flow ODE has the
closed form ``x(t) = mean + sqrt((v + t^2) / (v + T^2)) (x(T) - mean)``.  The order is
``log2(error(N) / error(2 N))`` at the last doubling of the number N of intervals, in float64, where
the error is the largest absolute error over the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from denoisers.analytic import GaussianDenoiser
from solvers.driver import Meter, State, advance
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.rules import FixedRatio
from solvers.types import Guide
from tools.docs_tables.pages import markdown

HEAD = ("solver", "order", "NFE per step", "history", "grid", "source (arXiv)")
T_FIRST, T_LAST = 2.0, 1.4  #: noise levels between which every solver walks
INTERVALS = 64  #: the last doubling is from this number to twice as many

GRIDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda n: torch.linspace(T_FIRST, T_LAST, n, dtype=torch.float64),
    "logsnr": lambda n: get_grid("logsnr", n, T_LAST, T_FIRST),
    "polynomial": lambda n: get_grid("polynomial", n, T_LAST, T_FIRST, 7),
}


@dataclass(frozen=True)
class Case:
    """One row: a solver, the grid it is measured on, and how its history starts."""

    title: str
    name: str
    order: int  #: in theory
    grid: str
    source: str
    options: dict = field(default_factory=dict)
    guide: Guide | None = None
    exact_start: bool = True  #: history starts with nodes on the exact solution, else without nodes


@dataclass(frozen=True)
class MeasuredOrder:
    """What is measured for a case."""

    order: float
    nfe_per_step: float
    history: int  #: number of nodes carried from step to step


def _ipndm(order: int, truth: int, grid: str, title: str = "", **more: object) -> Case:
    title = title or f"iPNDM ({order})"
    source = "2202.09778, 2204.13902"
    return Case(title, "ipndm", truth, grid, source, {"max_order": order}, **more)  # type: ignore[arg-type]


def _dpmpp(order: int, truth: int, form: str, *, corrected: bool = False, **more: object) -> Case:
    label = "`dpmpp3c`" if corrected else f"DPM-Solver++ ({order})"
    inserted = _inserted(more)
    source = {1: "2010.02502 (DDIM)", 2: "2211.01095, alg. 2"}.get(order, "2211.01095, its code")
    options: dict[str, object] = {"predict_x0": form == "data", "lower_order_final": False}
    if not corrected:
        options["max_order"] = order
    return Case(
        f"{label}, {form} form{inserted}",
        "dpmpp3c" if corrected else "dpmpp",
        truth,
        "polynomial" if inserted else "logsnr",
        "second difference doubled" if corrected else source,
        options,
        **more,  # type: ignore[arg-type]
    )


def _unipc(
    order: int, truth: int, variant: str = "bh2", grid: str = "logsnr", **more: object
) -> Case:
    options = {"max_order": order, "variant": variant, "lower_order_final": False}
    title = f"UniPC ({order}), {variant}{_inserted(more)}"
    return Case(title, "unipc", truth, grid, "2302.04867", options, **more)  # type: ignore[arg-type]


def _deis(order: int, truth: int, grid: str = "logsnr", **more: object) -> Case:
    title, options = f"DEIS ({order}){_inserted(more)}", {"max_order": order}
    return Case(title, "deis", truth, grid, "2204.13902", options, **more)  # type: ignore[arg-type]


def _ipndm_v(order: int, truth: int, **more: object) -> Case:
    title, options = f"iPNDM_v ({order}){_inserted(more)}", {"max_order": order}
    source = "Adams-Bashforth, true steps"
    return Case(title, "ipndm_v", truth, "polynomial", source, options, **more)  # type: ignore[arg-type]


def _inserted(more: Mapping[str, object]) -> str:
    return ", inserted node r = 0.4" if "guide" in more else ""


def _amed(truth: int, r: float) -> Case:
    title = f"AMED rule, r = {r}"
    return Case(title, "amed", truth, "polynomial", "2312.00094", guide=FixedRatio(r))


CASES: tuple[Case, ...] = (
    Case("Euler", "euler", 1, "polynomial", "2010.02502 (DDIM)"),
    Case("Heun", "heun", 2, "polynomial", "2206.00364, alg. 1"),
    *(
        Case(f"DPM-Solver-2, r = {r}", "dpm", 2, "polynomial", "2206.00927, alg. 1", {"r": r})
        for r in (0.3, 0.5, 0.8)
    ),
    Case("DPM-Solver-3", "dpm3", 3, "polynomial", "2206.00927, alg. 2"),
    Case("DPM-Solver-3", "dpm3", 3, "logsnr", "2206.00927, alg. 2"),
    _amed(2, 0.5),
    _amed(1, 0.3),
    _amed(1, 0.8),
    *(_ipndm(k, k, "uniform") for k in (1, 2, 3, 4)),
    _ipndm(4, 2, "uniform", exact_start=False),
    *(_ipndm(k, 2, "polynomial") for k in (2, 3, 4)),
    _ipndm(4, 2, "polynomial", "iPNDM (4), inserted node r = 0.5", guide=FixedRatio(0.5)),
    _ipndm(4, 1, "polynomial", "iPNDM (4), inserted node r = 0.4", guide=FixedRatio(0.4)),
    *(_dpmpp(k, min(k, 2), form) for form in ("data", "noise") for k in (1, 2, 3)),
    *(_dpmpp(3, 3, form, corrected=True) for form in ("data", "noise")),
    _dpmpp(3, 2, "data", corrected=True, exact_start=False),
    _dpmpp(2, 2, "data", guide=FixedRatio(0.4)),
    _dpmpp(3, 3, "data", corrected=True, guide=FixedRatio(0.4)),
    *(_unipc(k, k + 1, variant) for k, variant in ((1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh2"))),
    *(_unipc(k, 3, exact_start=False) for k in (2, 3)),
    _unipc(3, 4, grid="polynomial", guide=FixedRatio(0.4)),
    *(_deis(k, k) for k in (2, 3)),
    _deis(3, 2, exact_start=False),
    *(_ipndm_v(k, k) for k in (2, 3, 4)),
    _ipndm_v(4, 2, exact_start=False),
    _ipndm_v(4, 4, guide=FixedRatio(0.4)),
)


def problem() -> tuple[GaussianDenoiser, Tensor]:
    """Gaussian data with 16 variances from 0.5 to 2, and a state (1, 1, 4, 4) at ``T_FIRST``."""
    var = torch.logspace(math.log10(0.5), math.log10(2.0), 16, dtype=torch.float64)
    mean = torch.linspace(-1, 1, 16, dtype=torch.float64)
    wave = torch.cos(torch.arange(16, dtype=torch.float64)).reshape(1, 1, 4, 4)
    return GaussianDenoiser(mean.reshape(1, 4, 4), var.reshape(1, 4, 4)), T_FIRST * (1 + 0.3 * wave)


def walk(case: Case, intervals: int) -> tuple[float, float, int]:
    """Largest error at ``T_LAST``, network evaluations per step, and history nodes carried."""
    denoiser, start = problem()
    solver, meter = make_solver(case.name, **case.options), Meter(denoiser)
    ts = GRIDS[case.grid](intervals + 1)
    known = solver.kept_nodes if case.exact_start else 0
    nodes = tuple(meter(denoiser.solution(start, ts[0], t), t) for t in ts[:known])
    state = State(denoiser.solution(start, ts[0], ts[known]), nodes, substeps=known)
    spent = meter.nfe
    for t, t_next in zip(ts[known:], ts[known + 1 :], strict=False):
        state = advance(solver, meter, state, t, t_next, case.guide)
    error = float((state.x - denoiser.solution(start, ts[0], ts[-1])).abs().max())
    return error, (meter.nfe - spent) / (intervals - known), len(state.history)


def measure(case: Case, intervals: int = INTERVALS) -> MeasuredOrder:
    """The order of ``case`` by the slope from ``intervals`` to twice as many."""
    coarse, _, _ = walk(case, intervals)
    fine, nfe, history = walk(case, 2 * intervals)
    return MeasuredOrder(math.log2(coarse / fine), nfe, history)


def table() -> str:
    """The table of all `CASES`, measured now."""
    return published([measure(case) for case in CASES])


def published(measured: Sequence[MeasuredOrder]) -> str:
    """The Markdown table of `CASES` with their measured orders, rounded to one decimal."""
    rows = []
    for case, m in zip(CASES, measured, strict=True):
        history = "none"
        if m.history:
            nodes = "1 node" if m.history == 1 else f"{m.history} nodes"
            history = f"{nodes}, {'exact' if case.exact_start else 'cold'} start"
        cells = (case.title, f"{m.order:.1f}", f"{m.nfe_per_step:g}", history, case.grid)
        rows.append((*cells, case.source))
    return markdown(HEAD, rows)
