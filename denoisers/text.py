"""Prompts from a file."""

from __future__ import annotations

import csv
from pathlib import Path

from runtime.errors import UserError

COLUMN = "text"  #: of a CSV of captions


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a CSV with a column ``text``, or of a text file with a prompt a line.

    Raises UserError for a file that is neither, and names the row of an empty prompt.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() != ".csv":
                rows = file.read().splitlines()
            else:
                reader = csv.DictReader(file)
                if COLUMN not in (reader.fieldnames or ()):
                    raise UserError(
                        f"{path} has the columns {', '.join(reader.fieldnames or ()) or 'none'} "
                        f"and none called {COLUMN!r}: rename the column of the prompts"
                    )
                rows = [row[COLUMN] or "" for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}): save it as UTF-8") from error
    if not rows:
        raise UserError(
            f"{path} holds no prompt: write one a line, or a CSV with a {COLUMN!r} column"
        )
    for number, row in enumerate(rows):
        if not row.strip():
            raise UserError(f"{path}, row {number} (from 0) is an empty prompt: fill or remove it")
    return tuple(rows)
