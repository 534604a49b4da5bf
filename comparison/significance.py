"""Which rows of a comparison differ, and which the images that were made cannot tell apart.

All rows are images of the same seeds, so they are compared in pairs (`metrics.paired`): each row
with the best of its budget, and a student with the solver that it refines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.report.table import own_row
from evaluation.harness import Harness
from metrics.paired import Gap, enough, gap, holm, influences
from metrics.summary import FeatureSummary

Result = dict[str, Any]


def with_gaps(results: Sequence[Result], harness: Harness, folder: Path) -> list[Result]:
    """The results with ``to_best`` and ``to_own``: difference in FID, its standard error, and p.

    Either is None where there is nothing to compare with, or no influences (`_influences`). The
    p-values to the best are raised for as many rows as its budget has (Holm), since the largest of
    many differences by chance is no small one.
    """
    known = [_influences(row, harness, folder) for row in results]
    sides = {id(row): k for row, k in zip(results, known, strict=True) if k is not None}

    def compared(row: Result, other: Result | None) -> Gap | None:
        if other is None or other is row or id(row) not in sides or id(other) not in sides:
            return None
        pair = [(r["fid"], sides[id(r)]) for r in (row, other)]
        return gap(pair[0], pair[1], row["n"])

    to_best: dict[int, Gap] = {}
    for budget in {row["budget"] for row in results} - {None}:
        rows = [row for row in results if row["budget"] == budget]
        best = min(rows, key=lambda row: row["fid"])
        found = {id(row): g for row in rows if (g := compared(row, best)) is not None}
        raised = holm([g.p for g in found.values()])
        to_best |= {k: g._replace(p=p) for (k, g), p in zip(found.items(), raised, strict=True)}
    rows = list(results)
    return [
        {
            **row,
            "to_best": _plain(to_best.get(id(row))),
            "to_own": _plain(compared(row, own_row(row, rows) if row["own_solver"] else None)),
        }
        for row in results
    ]


def _influences(row: Mapping[str, Any], harness: Harness, folder: Path) -> np.ndarray | None:
    """Of the images whose features are kept, in order of their seeds.

    None for too few images, for a row of an older version, which kept no features, and for images
    so much alike that their covariance is singular.
    """
    file = folder / row.get("statistics", "")
    if not file.is_file() or not enough(row["n"], harness.detector.dim):
        return None
    kept = FeatureSummary.load(file, harness.detector)
    if kept.features is None:
        return None
    try:
        return influences(kept.features, kept.moments, harness.reference)
    except ValueError:
        return None


def _plain(found: Gap | None) -> dict[str, float] | None:
    return None if found is None else found._asdict()
