"""The classes of images in EDM's layout: ``{"labels": [[file, class], ...]}`` or null."""

from __future__ import annotations

import json
from collections.abc import Sequence

from runtime.typed import parse_json

TABLE = "dataset.json"


def parse_labels(data: bytes) -> dict[str, int] | None:
    """Classes by file name, from the content of a table; None if it has none.

    Raises KeyError, TypeError or ValueError for another layout; the values are not checked.
    """
    rows = parse_json(data, TABLE)["labels"]
    return None if rows is None else {name: label for name, label in rows}


def format_labels(names: Sequence[str], classes: Sequence[int] | None) -> bytes:
    """The content of a table with these classes, or none."""
    labels = None if classes is None else [list(row) for row in zip(names, classes, strict=True)]
    return json.dumps({"labels": labels}).encode()
