"""Replacing the text between two markers of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.errors import UserError
from runtime.files import write_text


def markers(name: str) -> tuple[str, str]:
    """The lines before and after the table called ``name``."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def current(page: Path, name: str) -> str:
    """The table called ``name`` on ``page``.  Raises UserError where its markers are missing."""
    return _parts(page, name)[1].strip()


def replace(page: Path, name: str, table: str) -> None:
    """Put ``table`` between the markers of ``name`` on ``page``; the rest of the page is kept.

    Raises UserError where the markers are missing.
    """
    head, _, tail = _parts(page, name)
    begin, end = markers(name)
    write_text(page, f"{head}{begin}\n{table}\n{end}{tail}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; ``|`` in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    """The page before, between and after the markers."""
    begin, end = markers(name)
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    table, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{page} has no place for this table: add the lines {begin} and {end}")
    return head, table, tail
