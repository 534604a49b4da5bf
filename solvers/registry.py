"""The registry of solvers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from solvers.dpmpp import DPMpp
from solvers.multistep import DEIS, VariableAdamsBashforth
from solvers.names import unknown
from solvers.rules import AdamsBashforth, FixedRatio, ThreeStage, TwoStage
from solvers.types import Solver
from solvers.unipc import UniPC


@dataclass(frozen=True)
class SolverKind:
    """A solver's factory and the options that it accepts."""

    make: Callable[..., Solver]
    options: frozenset[str] = frozenset()
    needs_guide: bool = False  #: it cannot step without a guide


_FORM = frozenset({"predict_x0", "lower_order_final", "thresholding"})

SOLVERS: Mapping[str, SolverKind] = {
    "euler": SolverKind(lambda: AdamsBashforth(max_order=1)),
    "heun": SolverKind(lambda: TwoStage(FixedRatio(1.0))),
    "dpm": SolverKind(lambda r=0.5: TwoStage(FixedRatio(r)), frozenset({"r"})),
    "dpm3": SolverKind(lambda: ThreeStage(FixedRatio(2 / 3))),
    "dpmpp": SolverKind(DPMpp, _FORM | {"max_order"}),
    "dpmpp3c": SolverKind(lambda **form: DPMpp(max_order=3, corrected=True, **form), _FORM),
    "ipndm": SolverKind(AdamsBashforth, frozenset({"max_order"})),
    "ipndm_v": SolverKind(VariableAdamsBashforth, frozenset({"max_order"})),
    "deis": SolverKind(DEIS, frozenset({"max_order"})),
    "unipc": SolverKind(UniPC, frozenset({"max_order", "lower_order_final", "variant"})),
    "amed": SolverKind(lambda: TwoStage(None, midpoint=True), needs_guide=True),
}

#: Solvers that need no guide, in the order of the command line's help.
CLASSIC = tuple(name for name, kind in SOLVERS.items() if not kind.needs_guide)


@dataclass(frozen=True)
class SolverOptions:
    """The options of all solvers; None means the solver's default."""

    max_order: int | None = None  #: dpmpp, ipndm, ipndm_v, deis, unipc
    predict_x0: bool | None = None  #: dpmpp, dpmpp3c: data form instead of noise form
    lower_order_final: bool | None = None  #: dpmpp, dpmpp3c, unipc
    thresholding: bool | None = None  #: dpmpp, dpmpp3c: dynamic thresholding
    r: float | None = None  #: dpm: position of the inserted node
    variant: str | None = None  #: unipc: B(h), bh1 or bh2

    def make(self, name: str) -> Solver:
        """The solver ``name`` with those of the options that it accepts."""
        return make_solver(name, **{key: getattr(self, key) for key in _kind(name).options})


def make_solver(name: str, **options: int | float | bool | str | None) -> Solver:
    """The solver ``name``, such as ``make_solver("ipndm", max_order=3)``.

    None means the solver's default; `SOLVERS` lists the options.  Raises ValueError for an
    unknown name, an option that the solver does not have, or a value out of range.
    """
    kind = _kind(name)
    unknown = sorted(set(options) - kind.options)
    if unknown:
        has = f"has {', '.join(sorted(kind.options))}" if kind.options else "has no options"
        raise ValueError(f"solver {name!r} has no option {unknown[0]!r}: it {has}")
    return kind.make(**{key: value for key, value in options.items() if value is not None})


def _kind(name: str) -> SolverKind:
    if name not in SOLVERS:
        raise ValueError(unknown("solver", name, SOLVERS))
    return SOLVERS[name]
