"""Prompts from a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO

from runtime.errors import UserError

COLUMN = "text"  #: of a CSV of captions


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a CSV with a column ``text``, or of a text file with a prompt a line.

    The place of a prompt is the seed of its image, so none is passed over: UserError names the
    row of an empty one, and a file that holds no prompts.
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
    """The texts of a CSV; "" where a row is too short (csv.DictReader would drop blank lines)."""
    reader = csv.reader(file)
    names = next(reader, [])
    if COLUMN not in names:
        raise UserError(
            f"{path} has the columns {', '.join(names) or 'none'} and none called {COLUMN!r}: "
            "rename the column of the prompts"
        )
    at = names.index(COLUMN)
    return [row[at] if at < len(row) else "" for row in reader]
