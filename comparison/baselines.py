"""What a row is compared with: the solver it refines, a strong plain solver, and a ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from comparison.results import ComparisonResults, MeasuredRow
from runtime.record import RunRecord

#: The excess of a row is measured by these two: a good plain solver, and the ceiling by Heun's
#: method (``Heun-35``), whose solver error is negligible.
YARDSTICK, CEILING = "iPNDM(4) + AFS", "Heun-"


def ordered(rows: Iterable[MeasuredRow]) -> list[MeasuredRow]:
    """By budget, the best row of each first; ceilings last."""
    return sorted(rows, key=lambda row: (row.budget is None, row.budget or 0, row.fid))


def own_solver_row(row: MeasuredRow, rows: Iterable[MeasuredRow]) -> MeasuredRow | None:
    """The row of the same budget by the solver that ``row`` refines; None without one."""
    if row.own_solver is None:
        return None
    return _of_method(row.own_solver, row.budget, rows)


def _of_method(method: str, budget: int | None, rows: Iterable[MeasuredRow]) -> MeasuredRow | None:
    return next((row for row in rows if row.budget == budget and row.method == method), None)


def heun_ceiling(rows: Iterable[MeasuredRow]) -> MeasuredRow | None:
    """The ceiling by Heun's method; None where ceilings were left out."""
    found = (row for row in rows if row.budget is None and row.method.startswith(CEILING))
    return next(found, None)


def excess(row: MeasuredRow, rows: Sequence[MeasuredRow]) -> float | None:
    """The share of the solver error that is left: 1 is iPNDM(4) + AFS at this NFE, 0 the ceiling.

    ``(FID - FID of Heun-35) / (FID of iPNDM(4) + AFS - FID of Heun-35)``, which sets the error of
    the model aside.  None without either row, and where the yardstick is no worse than the
    ceiling, so that there is no distance to measure by.
    """
    ceiling, yardstick = heun_ceiling(rows), _of_method(YARDSTICK, row.budget, rows)
    if row.budget is None or ceiling is None or yardstick is None:
        return None
    whole = yardstick.fid - ceiling.fid
    return (row.fid - ceiling.fid) / whole if whole > 0 else None


def completed(record: RunRecord, rows: Iterable[MeasuredRow]) -> ComparisonResults:
    """The results of a comparison: its rows in order, each with its excess."""
    listed = ordered(rows)
    whole = (replace(row, excess=excess(row, listed)) for row in listed)
    return ComparisonResults(record=record, rows=tuple(whole))
