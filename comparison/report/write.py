"""The files of a comparison's report: JSON, Markdown, CSV, a plot and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comparison.report.listing import series, short_name
from comparison.report.plots import against_nfe, legend, save
from comparison.report.table import csv_text, markdown
from comparison.results import ComparisonResults, MeasuredRow
from runtime.files import write_text
from runtime.images import image_grid, read_png, save_png
from runtime.seeds import parse_seeds
from runtime.typed import write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, CSV, RESULTS = "table.md", "table.csv", "results.json"
POINTS, PLOT, PICTURE = "fid-nfe.json", "fid-nfe.png", "grid.png"
ZOOM = 2  #: small images are shown larger


@dataclass(frozen=True)
class PlotPoint:
    """A point of the plot of FID against NFE, as ``fid-nfe.json`` lists them by line."""

    nfe: int
    fid: float
    spread: float  #: over the blocks
    detail: str


def write_report(folder: Path, results: ComparisonResults) -> list[Path]:
    """Write all six files into ``folder``; returns their paths, the table first."""
    rows = results.rows
    write_text(folder / TABLE, markdown(rows))
    write_text(folder / CSV, csv_text(rows))
    write_result(folder / RESULTS, results)
    write_result(folder / POINTS, plot_points(rows))
    save(folder / PLOT, lambda figure: _plot(figure, rows))
    _write_picture(folder, rows)
    return [folder / name for name in (TABLE, CSV, RESULTS, POINTS, PLOT, PICTURE)]


def plot_points(rows: Sequence[MeasuredRow]) -> dict[str, list[PlotPoint]]:
    """What the plot shows: the points of each line."""
    return {
        label: [
            PlotPoint(row.nfe_planned, row.fid, row.fid_block_spread, row.detail) for row in line
        ]
        for label, line in series(rows).items()
    }


def _plot(figure: Figure, rows: Sequence[MeasuredRow]) -> None:
    figure.set_size_inches(9, 4.5)
    title = f"FID ({rows[0].detector}, N = {rows[0].n})"
    axes = figure.add_subplot()
    against_nfe(axes, rows, lambda row: row.fid, title, lambda row: row.fid_block_spread)
    legend(figure)


def _write_picture(folder: Path, rows: Sequence[MeasuredRow]) -> None:
    """The same seeds down the columns, a row per method."""
    strips = [read_png(folder / row.pictures) for row in rows]
    side = strips[0].shape[0]
    images = [
        strip[:, i : i + side].repeat(ZOOM, 0).repeat(ZOOM, 1)
        for strip in strips
        for i in range(0, strip.shape[1], side)
    ]
    columns = strips[0].shape[1] // side
    seeds = parse_seeds(rows[0].identity.harness.seeds)[:columns]
    grid = image_grid(
        images,
        columns,
        labels=[f"seed {seed}" for seed in seeds],
        row_labels=[f"{short_name(r)}, {r.nfe_planned} NFE, FID {r.fid:.2f}" for r in rows],
    )
    save_png(folder / PICTURE, grid)
