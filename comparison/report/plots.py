"""What the plots of a comparison and of solver errors share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Marker and line of a group of rows.
STYLES = {
    "learned": "o-", "restart": "s--", "classic": "^:", "pds": "D-.", "ode": "^:", "sde": "v-.",
}  # fmt: skip
DASHES = ("--", ":", "-.")  #: of the ceilings, in turn
WIDE = 20  #: times the smallest budget, from which on the axis of NFE is logarithmic


def save(path: Path, draw: Callable[[Figure], None]) -> None:
    """Draw into a new figure and write it as a PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def short(row: dict[str, Any]) -> str:
    """Method, and for a student its teacher."""
    teacher = row["detail"].split(",")[0] if row["group"] == "learned" else ""
    return f"{row['method']} ({teacher})" if teacher else row["method"]


def series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each method that a plot joins, by its label; without the ceilings."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["budget"] is not None:
            lines.setdefault(short(row), []).append(row)
    return lines


def budgets(rows: list[dict[str, Any]]) -> list[int]:
    return sorted({row["budget"] for row in rows if row["budget"]})


def colors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A colour for each method, the same in every plot of these rows."""
    from matplotlib import colormaps

    names = sorted({short(row) for row in rows})
    return {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}


def against_nfe(
    axes: Axes, rows: list[dict[str, Any]], key: str, title: str, spread: str | None = None
) -> None:
    """A figure of every row, bars of its ``spread``, ceilings as grey levels; log scale.

    Against NFE with a line per method; at a single budget there is nothing to join, and the
    methods stand below each other in the order of the rows.
    """
    each, single = colors(rows), len(budgets(rows)) == 1
    groups = list(series(rows).values())
    if single:
        groups = [[row] for row in rows if row["budget"] is not None]
    for place, group in enumerate(groups):
        values, first = [row[key] for row in group], group[0]
        bars = [row[spread] for row in group] if spread else None
        style: dict[str, Any] = {"color": each[short(first)], "capsize": 3, "lw": 1, "ms": 5}
        fmt = STYLES[first["group"]]
        if single:
            axes.errorbar(values, [-place], xerr=bars, fmt=fmt[0], **style)
        else:
            nfe = [row["nfe_planned"] for row in group]
            axes.errorbar(nfe, values, bars, fmt=fmt, label=short(first), **style)
    _ceilings(rows, key, axes.axvline if single else axes.axhline)
    if single:
        _name_rows(axes, rows, title)
    else:
        _name_budgets(axes, rows, title)


def _ceilings(rows: list[dict[str, Any]], key: str, line: Callable[..., Any]) -> None:
    for row, dashes in zip((r for r in rows if r["budget"] is None), DASHES, strict=False):
        line(row[key], color="grey", ls=dashes, lw=1, label=row["method"])


def _name_rows(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    names = [short(row) for row in rows if row["budget"] is not None]
    axes.set_yticks([-place for place in range(len(names))], names, fontsize=8)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel(f"{title} at {budgets(rows)[0]} NFE")
    axes.grid(axis="y", lw=0.3)


def _name_budgets(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
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
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), fontsize=7, loc="outside right upper")


def plain_numbers(axis: Any) -> None:
    """Of a logarithmic axis: 20 and 0.02 where the default is 2 x 10^1 and 2 x 10^-2."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """The same ticks have numbers as would have."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())
