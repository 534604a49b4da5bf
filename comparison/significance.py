"""Which rows of a comparison differ, and which the measured images cannot tell apart.

All rows are images of the same seeds, so they are compared in pairs (`metrics.paired`): each row
with the best of its budget, and a student with the solver that it refines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from comparison.baselines import own_solver_row
from comparison.results import MeasuredRow
from evaluation.harness import Harness
from metrics.paired import Gap, enough, gap, holm, influences
from metrics.summary import FeatureSummary


def with_gaps(rows: Sequence[MeasuredRow], harness: Harness, folder: Path) -> list[MeasuredRow]:
    """The rows with ``to_best`` and ``to_own``: difference in FID, its standard error, and p.

    Either is None where there is nothing to compare with, and where a row has no influences.  The
    p-values to the best row are corrected for the number of rows at the budget (Holm), since the
    largest of many differences is large by chance as well.
    """
    tested = {id(row): _influences(row, harness, folder) for row in rows}

    def compared(row: MeasuredRow, other: MeasuredRow | None) -> Gap | None:
        if other is None or other is row:
            return None
        one, two = tested[id(row)], tested[id(other)]
        if one is None or two is None:
            return None
        return gap((row.fid, one), (other.fid, two), row.n)

    to_best: dict[int, Gap] = {}
    for budget in {row.budget for row in rows} - {None}:
        same = [row for row in rows if row.budget == budget]
        best = min(same, key=lambda row: row.fid)
        gaps = {id(row): g for row in same if (g := compared(row, best)) is not None}
        corrected = holm([g.p for g in gaps.values()])
        to_best |= {k: replace(g, p=p) for (k, g), p in zip(gaps.items(), corrected, strict=True)}
    return [
        replace(
            row,
            to_best=to_best.get(id(row)),
            to_own=compared(row, own_solver_row(row, rows)),
        )
        for row in rows
    ]


def _influences(row: MeasuredRow, harness: Harness, folder: Path) -> np.ndarray | None:
    """The influences of the images whose features are kept, in the order of their seeds.

    None for too few images, for a row of an older version, which kept no features, and for images
    so much alike that their covariance is singular.
    """
    if row.statistics is None or not enough(row.n, harness.detector.dim):
        return None
    file = folder / row.statistics
    if not file.is_file():
        return None
    kept = FeatureSummary.load(file, harness.detector)
    if kept.features is None:
        return None
    try:
        return influences(kept.features, kept.moments, harness.reference)
    except ValueError:
        return None
