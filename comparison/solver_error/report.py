"""The report on solver errors: JSON, Markdown and three plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.report.listing import budgets, markdown_table, short_name
from comparison.report.plots import STYLES, Color, against_nfe, colors, legend, plain_numbers, save
from comparison.solver_error.results import (
    Point,
    ShownTrajectory,
    SolverErrorResults,
    SolverErrorRow,
)
from runtime.files import write_text
from runtime.typed import write_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE, TABLE = "errors.json", "errors.md"
HEAD = ("method", "NFE", "x", "features", "largest interval", "NFE metered", "detail")
CLOSE = 3.0  #: noise level below which the end of a trajectory is shown enlarged

Rows = Sequence[SolverErrorRow]


def write_errors(folder: Path, results: SolverErrorResults) -> list[Path]:
    """Write the report into ``folder``; returns paths, the table first."""
    rows = results.rows
    write_text(folder / TABLE, markdown(results))
    write_result(folder / FILE, results)
    plots: dict[str, Callable[[Figure], None]] = {
        "errors-nfe.png": lambda figure: _against_nfe(figure, rows),
        "errors-local.png": lambda figure: _local(figure, rows),
        "trajectories.png": lambda figure: _trajectories(figure, results.trajectory, rows),
    }
    for name, draw in plots.items():
        save(folder / name, draw)
    return [folder / name for name in (TABLE, FILE, *plots)]


def by_error(rows: Iterable[SolverErrorRow]) -> list[SolverErrorRow]:
    """By budget, the smallest error of each first; ceilings last."""
    return sorted(rows, key=lambda row: (row.budget is None, row.budget or 0, row.x))


def caption(results: SolverErrorResults) -> str:
    """What the numbers are, in words."""
    exact, plane = results.exact, results.plane
    words = [
        f"Model {exact.model}; distance to the exact solution of the ODE (dopri5 at a tolerance "
        f"of {exact.tol:g}, {exact.nfe:.0f} NFE) from the same latents, seeds "
        f"{exact.seeds}. x: root mean square over the pixels of an image in [-1, 1], the mean "
        "over the images and its standard error. Largest interval: the same for one interval that "
        "starts from the exact state, and the noise level where it ends."
    ]
    if exact.detector:
        words.append(
            f"Features: Euclidean distance in those of detector {exact.detector}, where two "
            f"different exact images lie {exact.feature_scale:.4g} apart (root mean square)."
        )
    words.append(
        f"Of the variance of an exact trajectory ({plane.points} points), "
        f"{plane.one_mean:.4%} lies along one line and {plane.both_mean:.4%} in a plane "
        f"(least {plane.both_least:.4%}): {plane.rest_mean:.1%} of what the line leaves. No "
        f"point is farther from it than {plane.off_most:.2%} of the way from start to end."
    )
    return " ".join(words)


def cells(row: SolverErrorRow) -> list[str]:
    """A row of the table under ``HEAD``; plain text."""
    worst = max(range(len(row.local)), key=lambda i: row.local[i])
    features = row.features
    return [
        row.method,
        str(row.nfe_planned),
        f"{row.x:.4f} +- {row.x_error:.4f}",
        "" if features is None else f"{features:.3f} +- {row.features_error:.3f}",
        f"{row.local[worst]:.4f} (to {row.times[worst + 1]:.3g})",
        str(row.nfe_metered),
        row.detail,
    ]


def left_out(results: SolverErrorResults) -> list[str]:
    """A sentence for each row without an exact counterpart."""
    return [f"Left out: {row.method}: {row.why}." for row in results.skipped]


def markdown(results: SolverErrorResults) -> str:
    """The table, best row of each budget first, and what was left out."""
    table = markdown_table(HEAD, map(cells, results.rows), results.rows)
    skipped = ["", *left_out(results)] if results.skipped else []
    return "\n".join([caption(results), "", *table, *skipped]) + "\n"


def _against_nfe(figure: Figure, rows: Rows) -> None:
    """Distance in x and in features, a panel each."""
    single = len(budgets(rows)) == 1
    measured = [row.features for row in rows if row.features is not None]
    panels = 2 if len(measured) == len(rows) else 1
    figure.set_size_inches(5 * panels + 3, 4.5)
    axes = figure.subplots(1, panels, sharey=single, squeeze=False)[0]
    against_nfe(axes[0], rows, lambda row: row.x, "RMS distance in x", lambda row: row.x_error)
    if panels == 2:
        against_nfe(
            axes[1],
            rows,
            lambda row: row.features or 0.0,
            "distance in features",
            lambda row: row.features_error or 0.0,
        )
    legend(figure)


def _local(figure: Figure, rows: Rows) -> None:
    """The error of each interval against the noise level where it ends, a panel per NFE."""
    every = budgets(rows)
    columns = min(2, len(every))
    lines = -(-len(every) // 2)
    figure.set_size_inches(4 * columns + 3, 3.6 * lines)
    each = colors(rows)
    for index, nfe in enumerate(every):
        first = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(lines, columns, index + 1, sharey=first)
        for row in (r for r in rows if r.budget == nfe):
            ends = [(t, e) for t, e in zip(row.times[1:], row.local, strict=True) if t > 0]
            if not ends:  # a table that leads to 0 is one interval
                continue
            name = short_name(row)
            levels, errors = zip(*ends, strict=True)
            axes.loglog(levels, errors, STYLES[row.group], color=each[name], lw=1, ms=4, label=name)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.invert_xaxis()
        axes.set_title(f"{nfe} NFE", fontsize=9)
        axes.set_xlabel("noise level at the end of the interval", fontsize=8)
        axes.set_ylabel("error of one interval, RMS", fontsize=8)
    legend(figure)


def _trajectories(figure: Figure, shown: ShownTrajectory, rows: Rows) -> None:
    """One seed's trajectories in the plane of the exact one: whole, and its end enlarged."""
    every = budgets(rows)
    figure.set_size_inches(12, 3.6 * len(every))
    near = [p for p, t in zip(shown.exact, shown.times, strict=True) if t < CLOSE]
    for index, nfe in enumerate(every):
        same = [row for row in rows if row.budget == nfe]
        for column, title in enumerate(("whole", f"end (noise below {CLOSE:g})")):
            axes = figure.add_subplot(len(every), 2, 2 * index + column + 1)
            _draw_paths(axes, shown, same, colors(rows))
            axes.set_title(f"{nfe} NFE, {title}", fontsize=9)
            if column:
                _enclose(axes, near)
    legend(figure)


def _draw_paths(axes: Axes, shown: ShownTrajectory, rows: Rows, each: dict[str, Color]) -> None:
    along, across = zip(*shown.exact, strict=True)
    axes.plot(along, across, "k-", lw=1.5, label="exact")
    for row in rows:
        if row.key not in shown.rows:
            continue
        name = short_name(row)
        along, across = zip(*shown.rows[row.key], strict=True)
        axes.plot(along, across, STYLES[row.group], color=each[name], lw=0.8, ms=4, label=name)
    axes.set_xlabel(f"first component ({shown.explained[0]:.4%} of the variance)", fontsize=8)
    axes.set_ylabel(f"second ({shown.rest:.1%} of the rest)", fontsize=8)


def _enclose(axes: Axes, points: Sequence[Point]) -> None:
    """Limits around some points, with a margin."""
    along, across = zip(*points, strict=True)
    axes.set_xlim(_limits(along))
    axes.set_ylim(_limits(across))


def _limits(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = 0.3 * (high - low) or 1.0
    return low - margin, high + margin
