"""What the plots of a comparison and of solver errors share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.report.listing import R, ReportedRow, budgets, series, short_name
from runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Color = tuple[float, float, float, float]
#: Marker and line of a group of rows.
STYLES = {
    "learned": "o-", "restart": "s--", "classic": "^:", "diffusers": "x:", "pds": "D-.",
    "ode": "^:", "sde": "v-.",
}  # fmt: skip
DASHES = ("--", ":", "-.")  #: of the ceilings, in turn
WIDE = 20  #: from this ratio of largest to smallest budget on, the axis of NFE is logarithmic


def save(path: Path, draw: Callable[[Figure], None]) -> None:
    """Draw into a new figure and write it as a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def colors(rows: Sequence[ReportedRow]) -> dict[str, Color]:
    """A colour for each method, the same in every plot of these rows."""
    from matplotlib import colormaps

    names = sorted({short_name(row) for row in rows})
    return {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}


def against_nfe(
    axes: Axes,
    rows: Sequence[R],
    value: Callable[[R], float],
    title: str,
    error: Callable[[R], float] | None = None,
) -> None:
    """A value of every row, bars of its ``error``, ceilings as grey lines; log scale.

    Against NFE with a line per method.  At a single budget there is nothing to join, and the
    methods are listed below each other in the order of the rows.
    """
    each, single = colors(rows), len(budgets(rows)) == 1
    groups = list(series(rows).values())
    if single:
        groups = [[row] for row in rows if row.budget is not None]
    for place, group in enumerate(groups):
        values, first = [value(row) for row in group], group[0]
        bars = [error(row) for row in group] if error else None
        color, fmt = each[short_name(first)], STYLES[first.group]
        if single:
            axes.errorbar(
                values, [-place], xerr=bars, fmt=fmt[0], color=color, capsize=3, lw=1, ms=5
            )
        else:
            nfe, label = [row.nfe_planned for row in group], short_name(first)
            axes.errorbar(
                nfe, values, bars, fmt=fmt, label=label, color=color, capsize=3, lw=1, ms=5
            )
    _draw_ceilings(rows, value, axes.axvline if single else axes.axhline)
    if single:
        _name_rows(axes, rows, title)
    else:
        _name_budgets(axes, rows, title)


def _draw_ceilings(
    rows: Sequence[R], value: Callable[[R], float], line: Callable[..., object]
) -> None:
    ceilings = (row for row in rows if row.budget is None)
    for row, dashes in zip(ceilings, DASHES, strict=False):
        line(value(row), color="grey", ls=dashes, lw=1, label=row.method)


def _name_rows(axes: Axes, rows: Sequence[ReportedRow], title: str) -> None:
    names = [short_name(row) for row in rows if row.budget is not None]
    axes.set_yticks([-place for place in range(len(names))], names, fontsize=8)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel(f"{title} at {budgets(rows)[0]} NFE")
    axes.grid(axis="y", lw=0.3)


def _name_budgets(axes: Axes, rows: Sequence[ReportedRow], title: str) -> None:
    nfe = budgets(rows)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_ylabel(title)
    axes.set_xlabel("network evaluations (NFE)")
    if nfe and nfe[-1] > WIDE * nfe[0]:
        axes.set_xscale("log")
    axes.set_xticks(nfe, [str(budget) for budget in nfe])
    axes.set_xticks([], minor=True)


def legend(figure: Figure) -> None:
    """One legend for all panels, beside them."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), fontsize=7, loc="outside right upper")


def plain_numbers(axis: Axis) -> None:
    """On a logarithmic axis: 20 and 0.02 in place of the default 2 x 10^1 and 2 x 10^-2."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the same ticks as the default, with plain numbers."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())
