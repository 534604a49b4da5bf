"""Solvers by name: one dict, no decorators."""

from __future__ import annotations

from collections.abc import Callable

from solvers.dpmpp import DPMpp
from solvers.rules import AdamsBashforth, FixedRatio, ThreeStage, TwoStage
from solvers.types import Solver

DPMPP_OPTIONS = ("max_order", "predict_x0", "lower_order_final", "thresholding")


def _dpmpp(corrected: bool = False, **options: object) -> Solver:
    chosen = {k: v for k, v in options.items() if k in DPMPP_OPTIONS and v is not None}
    return DPMpp(**chosen, corrected=corrected)  # type: ignore[arg-type]


def _ipndm(max_order: int | None = None, **_: object) -> Solver:
    return AdamsBashforth(max_order=4 if max_order is None else max_order)


def _dpm(r: float | None = None, **_: object) -> Solver:
    return TwoStage(FixedRatio(0.5 if r is None else r))


SOLVERS: dict[str, Callable[..., Solver]] = {
    "euler": lambda **_: AdamsBashforth(max_order=1),
    "heun": lambda **_: TwoStage(FixedRatio(1.0)),
    "dpm": _dpm,
    "dpm3": lambda **_: ThreeStage(FixedRatio(2 / 3)),
    "dpmpp": _dpmpp,
    "dpmpp3c": lambda **o: _dpmpp(**{**o, "max_order": 3, "corrected": True}),
    "ipndm": _ipndm,
    "amed": lambda **_: TwoStage(None, midpoint=True),
}

#: Solvers that are nothing without a guide: the AMED rule needs its learned time.
NEEDS_GUIDE = ("amed",)


def make_solver(name: str, **options: object) -> Solver:
    """The solver called ``name``; options that it does not have are ignored.

    Options: ``max_order`` (dpmpp, ipndm), ``predict_x0``, ``lower_order_final``,
    ``thresholding`` (dpmpp, dpmpp3c), ``r`` (dpm).  None means the solver's own default.
    Raises ValueError for an unknown name or an option out of range.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name](**options)
