"""The report on solver errors: JSON, Markdown and three plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison.report.plots import (
    STYLES,
    against_nfe,
    budgets,
    colors,
    legend,
    plain_numbers,
    save,
    short,
)
from runtime.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "errors.json"
HEAD = ("method", "NFE", "x", "features", "largest interval", "NFE metered", "detail")
CLOSE = 3.0  #: noise level below which the end of a trajectory is shown enlarged


def write_errors(folder: Path, content: dict[str, Any]) -> list[Path]:
    """Write the report of ``content`` (see :func:`.measure.run`); returns paths."""
    rows = content["rows"]
    text = {"errors.md": markdown(content), FILE: json.dumps(content, indent=2)}
    for name, whole in text.items():
        write_text(folder / name, whole)
    plots: dict[str, Callable[[Figure], None]] = {
        "errors-nfe.png": lambda figure: _against_nfe(figure, rows),
        "errors-local.png": lambda figure: _local(figure, rows),
        "trajectories.png": lambda figure: _trajectories(figure, content["trajectory"], rows),
    }
    for name, draw in plots.items():
        save(folder / name, draw)
    return [folder / name for name in (*text, *plots)]


def sentence(content: dict[str, Any]) -> str:
    """What the figures are, in words."""
    exact, plane = content["exact"], content["plane"]
    words = [
        f"Model {exact['model']}; distance to the exact solution of the ODE (dopri5 at a tolerance "
        f"of {exact['tol']:g}, {exact['nfe']:.0f} NFE) from the same latents, seeds "
        f"{exact['seeds']}. x: root mean square over the pixels of an image in [-1, 1], the mean "
        "over the images and its standard error. Largest interval: the same for one interval that "
        "starts from the exact state, and the noise level where it ends."
    ]
    if exact["detector"]:
        words.append(
            f"Features: Euclidean distance in those of detector {exact['detector']}, where two "
            f"different exact images lie {exact['feature_scale']:.4g} apart (root mean square)."
        )
    words.append(
        f"Of the variance of an exact trajectory ({plane['points']} points), "
        f"{plane['one_mean']:.4%} lies along one line and {plane['both_mean']:.4%} in a plane "
        f"(least {plane['both_least']:.4%}): {plane['rest_mean']:.1%} of what the line leaves. No "
        f"point is farther from it than {plane['off_most']:.2%} of the way from start to end."
    )
    return " ".join(words)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table under ``HEAD``; plain text."""
    worst = max(range(len(row["local"])), key=lambda i: row["local"][i])
    features = row["features"]
    return [
        row["method"],
        str(row["nfe_planned"]),
        f"{row['x']:.4f} +- {row['x_error']:.4f}",
        "" if features is None else f"{features:.3f} +- {row['features_error']:.3f}",
        f"{row['local'][worst]:.4f} (to {row['times'][worst + 1]:.3g})",
        str(row["nfe_metered"]),
        row["detail"],
    ]


def markdown(content: dict[str, Any]) -> str:
    """The table, best row of each budget first, and what was left out."""
    out = [sentence(content), "", "| " + " | ".join(HEAD) + " |"]
    out.append("|" + "|".join("---" if h in ("method", "detail") else "---:" for h in HEAD) + "|")
    for row in content["rows"]:
        name, *rest = cells(row)
        name = f"**{name}**" if row["group"] == "learned" else name
        out.append("| " + " | ".join(c.replace("|", "\\|") for c in (name, *rest)) + " |")
    if content["skipped"]:
        out += ["", *(f"Left out: {s['method']}: {s['why']}." for s in content["skipped"])]
    return "\n".join(out) + "\n"


def by_error(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By budget, the closest row of each first; ceilings last."""
    return sorted(results, key=lambda r: (r["budget"] is None, r["budget"] or 0, r["x"]))


def _against_nfe(figure: Figure, rows: list[dict[str, Any]]) -> None:
    """Distance in x and in features, a panel each."""
    panels = {"x": "RMS distance in x"}
    if all(row["features"] is not None for row in rows):
        panels["features"] = "distance in features"
    figure.set_size_inches(5 * len(panels) + 3, 4.5)
    axes = figure.subplots(1, len(panels), sharey=len(budgets(rows)) == 1, squeeze=False)
    for panel, (key, title) in zip(axes[0], panels.items(), strict=True):
        against_nfe(panel, rows, key, title, f"{key}_error")
    legend(figure)


def _local(figure: Figure, rows: list[dict[str, Any]]) -> None:
    """The error of each interval against the noise level where it ends, a panel per NFE."""
    every = budgets(rows)
    columns = min(2, len(every))
    lines = -(-len(every) // 2)
    figure.set_size_inches(4 * columns + 3, 3.6 * lines)
    each = colors(rows)
    for index, nfe in enumerate(every):
        first = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(lines, columns, index + 1, sharey=first)
        for row in (r for r in rows if r["budget"] == nfe):
            ends = [(t, e) for t, e in zip(row["times"][1:], row["local"], strict=True) if t > 0]
            style = STYLES[row["group"]]
            axes.loglog(*zip(*ends, strict=True), style, color=each[short(row)], lw=1, ms=4,
                        label=short(row))  # fmt: skip
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.invert_xaxis()
        axes.set_title(f"{nfe} NFE", fontsize=9)
        axes.set_xlabel("noise level at the end of the interval", fontsize=8)
        axes.set_ylabel("error of one interval, RMS", fontsize=8)
    legend(figure)


def _trajectories(figure: Figure, shown: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One seed's trajectories in the plane of the exact one: whole, and its end enlarged."""
    every = budgets(rows)
    figure.set_size_inches(12, 3.6 * len(every))
    each = colors(rows)
    one = shown["explained"][0]
    curve = list(zip(*shown["exact"], strict=True))
    for index, nfe in enumerate(every):
        mine = [(r, shown["rows"][r["key"]]) for r in rows if r["budget"] == nfe]
        for column, title in enumerate(("whole", f"end (noise below {CLOSE:g})")):
            axes = figure.add_subplot(len(every), 2, 2 * index + column + 1)
            axes.plot(*curve, "k-", lw=1.5, label="exact")
            for row, points in mine:
                style = STYLES[row["group"]]
                axes.plot(*zip(*points, strict=True), style, color=each[short(row)], lw=0.8,
                          ms=4, label=short(row))  # fmt: skip
            axes.set_title(f"{nfe} NFE, {title}", fontsize=9)
            axes.set_xlabel(f"first component ({one:.4%} of the variance)", fontsize=8)
            axes.set_ylabel(f"second ({shown['rest']:.1%} of the rest)", fontsize=8)
            if column:
                near = [p for p, t in zip(shown["exact"], shown["times"], strict=True) if t < CLOSE]
                _enclose(axes, near)
    legend(figure)


def _enclose(axes: Any, points: list[list[float]]) -> None:
    """Limits around some points, with room for what passes them by."""
    for values, limit in zip(
        zip(*points, strict=True), (axes.set_xlim, axes.set_ylim), strict=True
    ):
        low, high = min(values), max(values)
        room = 0.3 * (high - low) or 1.0
        limit(low - room, high + room)
