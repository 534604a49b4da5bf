"""What plots show is what the rows say."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from comparison.report.listing import budgets, series
from comparison.report.plots import against_nfe
from comparison.report.write import PlotPoint, plot_points
from comparison.results import MeasuredRow
from tests.comparison_problems import measured_row


def row(method: str, budget: int | None, fid: float, group: str = "classic") -> MeasuredRow:
    detail = "heun teacher, M = 1" if group == "learned" else "polynomial"
    return measured_row(method, budget, fid, group, detail=detail, fid_block_spread=fid / 10)


ONE = [row("AMED", 5, 12, "learned"), row("Euler", 5, 20), row("Heun-35", None, 10)]
TWO = [row("Euler", 3, 40), *ONE]


def drawn(rows: list[MeasuredRow]) -> Any:
    axes = Figure().add_subplot()
    against_nfe(axes, rows, lambda row: row.fid, "FID", lambda row: row.fid_block_spread)
    return axes


def bars(axes: Any) -> list[Any]:
    """Of each container of points and bars: its points, and the ends of its bars."""
    return [
        (c.lines[0].get_xydata().tolist(), [s.tolist() for s in c.lines[2][0].get_segments()])
        for c in axes.containers
    ]


def test_several_budgets_are_lines_against_nfe() -> None:
    axes = drawn(TWO)
    euler, amed = bars(axes)
    assert euler[0] == [[3, 40], [5, 20]] and amed[0] == [[5, 12]]
    assert euler[1] == [[[3, 36], [3, 44]], [[5, 18], [5, 22]]]
    assert axes.get_xticks().tolist() == budgets(TWO) == [3, 5]
    assert axes.get_ylabel() == "FID" and axes.get_yscale() == "log"
    assert axes.get_legend_handles_labels()[1] == ["Heun-35", "Euler", "AMED (heun teacher)"]


def test_a_single_budget_is_a_list_of_methods_in_the_order_of_the_rows() -> None:
    axes = drawn(ONE)
    names = {tick: text.get_text() for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(),
                                                         strict=True)}  # fmt: skip
    (amed, amed_bar), (euler, _) = bars(axes)
    assert [x for x, _ in (*amed, *euler)] == [12, 20]
    assert names[amed[0][1]] == "AMED (heun teacher)" and names[euler[0][1]] == "Euler"
    assert amed[0][1] > euler[0][1]  # the first row on top
    assert [x for x, _ in amed_bar[0]] == pytest.approx([10.8, 13.2])
    (ceiling,) = (line for line in axes.lines if line.get_label() == "Heun-35")
    assert list(ceiling.get_xdata()) == [10, 10]
    assert axes.get_xlabel() == "FID at 5 NFE"


def test_ceilings_belong_to_no_line() -> None:
    assert list(series(ONE)) == ["AMED (heun teacher)", "Euler"]


def test_the_points_of_the_plot_are_listed_by_line() -> None:
    assert plot_points(TWO) == {
        "Euler": [PlotPoint(3, 40, 4, "polynomial"), PlotPoint(5, 20, 2, "polynomial")],
        "AMED (heun teacher)": [PlotPoint(5, 12, 1.2, "heun teacher, M = 1")],
    }
