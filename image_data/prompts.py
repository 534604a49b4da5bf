"""Prompts from text files and CSVs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO

from runtime.errors import UserError

COLUMN = "text"  #: of a CSV of captions


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts in the column ``text`` of a CSV, or in the lines of another text file.

    The index of a prompt is the seed of its image, so none is skipped: raises UserError for an
    empty prompt, naming its row, and for a file without prompts.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                rows = _column(file, path)
            else:
                rows = [line.rstrip("\r\n") for line in file]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check --prompt_path") from error
    if not rows:
        raise UserError(
            f"{path} holds no prompt: write one a line, or a CSV with a {COLUMN!r} column"
        )
    for number, row in enumerate(rows):
        if not row.strip():
            raise UserError(f"{path}, row {number} (from 0) is an empty prompt: fill or remove it")
    return tuple(rows)


def _column(file: TextIO, path: Path) -> list[str]:
    """The texts of a CSV; "" for a row that is too short (csv.DictReader would drop blank rows)."""
    reader = csv.reader(file)
    names = next(reader, [])
    if COLUMN not in names:
        raise UserError(
            f"{path} has the columns {', '.join(names) or 'none'} and none called {COLUMN!r}: "
            "rename the column of the prompts"
        )
    column = names.index(COLUMN)
    return [row[column] if column < len(row) else "" for row in reader]
