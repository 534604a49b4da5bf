"""What all reports share: which rows they take, what they call them, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class ReportedRow(Protocol):
    """A row of any report: of a comparison, or of solver errors."""

    @property
    def method(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def budget(self) -> int | None: ...

    @property
    def detail(self) -> str: ...

    @property
    def nfe_planned(self) -> int: ...

    @property
    def seconds(self) -> float | None: ...


R = TypeVar("R", bound=ReportedRow)
LEFT = ("method", "detail")  #: columns of words; the others are aligned to the right


def short_name(row: ReportedRow) -> str:
    """Method, and for a student its teacher."""
    teacher = row.detail.split(",")[0] if row.group == "learned" else ""
    return f"{row.method} ({teacher})" if teacher else row.method


def budgets(rows: Iterable[ReportedRow]) -> list[int]:
    """The budgets of the rows, increasing; ceilings have none."""
    return sorted({row.budget for row in rows if row.budget})


def series(rows: Iterable[R]) -> dict[str, list[R]]:
    """The rows of each method that a plot joins, by its short name; without the ceilings."""
    lines: dict[str, list[R]] = {}
    for row in rows:
        if row.budget is not None:
            lines.setdefault(short_name(row), []).append(row)
    return lines


def markdown_table(
    head: Sequence[str], cells: Iterable[Sequence[str]], rows: Iterable[ReportedRow]
) -> list[str]:
    """Lines of a table of plain cells, the method first; learned rows are bold."""
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if title in LEFT else "---:" for title in head) + "|",
    ]
    for row, line in zip(rows, cells, strict=True):
        name, *rest = (cell.replace("|", "\\|") for cell in line)
        name = f"**{name}**" if row.group == "learned" else name
        lines.append("| " + " | ".join((name, *rest)) + " |")
    return lines
