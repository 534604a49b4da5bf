"""The report: a table, a check of the paper's claims, and its figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.files import atomic_write, write_json, write_text
from toy.experiment import Point, Results
from toy.processes import FAMILIES

NAMES = {"ode": "ODE", "sde": "SDE", "restart": "Restart", "sde-wide": "SDE, above t_max too"}
STYLES = {"ode": ("C0", "^"), "sde": ("C1", "s"), "restart": ("C3", "o"), "sde-wide": ("grey", "x")}
ERRORS = ("total", "contracted", "additional")


@dataclass(frozen=True)
class Mean:
    """The mean of an error over blocks, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of two or more values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.error:.3f}"


@dataclass(frozen=True)
class ToyRow:
    """The mean errors of a candidate."""

    family: str
    label: str
    nfe: int
    total: Mean
    contracted: Mean
    additional: Mean


@dataclass(frozen=True)
class Claim:
    """An inequality between errors, and the mean difference over the blocks."""

    text: str
    margin: Mean

    @property
    def holds(self) -> bool:
        return self.margin.value > 0


def rows(points: Sequence[Point]) -> list[ToyRow]:
    """The mean errors of each candidate over its blocks, by budget and family."""
    groups: dict[tuple[int, int, str], list[Point]] = {}
    for point in points:
        family = FAMILIES.index(point.family)
        groups.setdefault((point.nfe, family, point.label), []).append(point)
    return [
        ToyRow(
            FAMILIES[family],
            label,
            nfe,
            *(Mean.of([getattr(point, error) for point in group]) for error in ERRORS),
        )
        for (nfe, family, label), group in sorted(groups.items())
    ]


def claims(results: Results) -> list[Claim]:
    """The paper's claims as inequalities, at every budget.

    Restart's total error is below that of the ODE and of the SDE, and its contracted error below
    the ODE's.  Differences are taken within a block, where both have the same latents.
    """
    at = {(p.nfe, p.family, p.block): p for p in results.chosen}
    blocks = sorted({p.block for p in results.chosen})
    inequalities = []
    for nfe in sorted({p.nfe for p in results.chosen}):
        for error, family in (("total", "ode"), ("total", "sde"), ("contracted", "ode")):
            margins = [
                getattr(at[nfe, family, b], error) - getattr(at[nfe, "restart", b], error)
                for b in blocks
            ]
            text = f"{nfe} NFE: {error} error of Restart < that of the {NAMES[family]}"
            inequalities.append(Claim(text, Mean.of(margins)))
    return inequalities


def table(results: Results) -> str:
    """The rows, the floor and the claims as Markdown."""
    lines = ["| NFE | | settings | " + " | ".join(ERRORS) + " |", "|---|---|---|---|---|---|"]
    for row in rows(results.chosen):
        errors = " | ".join(str(getattr(row, error)) for error in ERRORS)
        settings = row.label.split(" ", 1)[1].replace("|", "then")
        lines.append(f"| {row.nfe} | {NAMES[row.family]} | {settings} | {errors} |")
    lines += ["", f"A fresh sample of the mixture: total {Mean.of(results.floor)}.", ""]
    for claim in claims(results):
        lines.append(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}, by {claim.margin}")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Results) -> list[Path]:
    """Write ``table.md``, ``results.json`` and ``errors.png``; returns their paths."""
    content: dict[str, Any] = {
        "record": json.loads(results.record.to_json()),
        "floor": results.floor,
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in claims(results)],
        "rows": [asdict(row) for row in rows(results.chosen)],
        "swept": [asdict(point) for point in results.swept],
        "chosen": [asdict(point) for point in results.chosen],
    }
    paths = [folder / name for name in ("table.md", "results.json", "errors.png")]
    write_text(paths[0], table(results))
    write_json(paths[1], content)
    _figure(paths[2], results)
    return paths


def frontier(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto frontier of the pairs (both numbers minimised), by the first number."""
    best: list[tuple[float, float]] = []
    for pair in sorted(pairs):
        if not best or pair[1] < best[-1][1]:
            best.append(pair)
    return best


def _figure(path: Path, results: Results) -> None:
    """Figure 2 of the paper: contracted and total error over additional error; total over NFE."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    reported, everything = rows(results.chosen), rows(results.swept)
    for family in FAMILIES:
        color, marker = STYLES[family]
        swept = [row for row in everything if row.family == family]
        pairs = [(row.additional.value, row.contracted.value) for row in swept]
        left.plot(*zip(*pairs, strict=True), marker, color=color, ms=4, alpha=0.5)
        left.plot(*zip(*frontier(pairs), strict=True), "-", color=color, lw=1.5)
        totals = [(row.additional.value, row.total.value) for row in swept]
        middle.plot(*zip(*totals, strict=True), marker, color=color, ms=4, alpha=0.7)
        chosen = [row for row in reported if row.family == family]
        right.errorbar(
            [row.nfe for row in chosen],
            [row.total.value for row in chosen],
            [row.total.error for row in chosen],
            fmt=marker + "-", color=color, capsize=3, lw=1.5, label=NAMES[family],
        )  # fmt: skip
    right.axhline(statistics.fmean(results.floor), color="black", ls=":", lw=1, label="fresh data")
    for axes, title in ((left, "(a)"), (middle, "(b)"), (right, "(c)")):
        axes.set_title(title, fontsize=10, loc="left")
    for axes, what in ((left, "contracted"), (middle, "total"), (right, "total")):
        axes.set_ylabel(f"{what} error (W1)")
    for axes in (left, middle):
        axes.set_xlabel("additional error (W1)")
    right.set_xlabel("network evaluations (NFE)")
    right.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
