"""The table of a comparison: its columns, its caption, and its forms in Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import fields

from comparison.baselines import YARDSTICK, heun_ceiling, own_solver_row
from comparison.report.listing import markdown_table
from comparison.results import MeasuredRow
from metrics.paired import LEVEL, Gap

Rows = Sequence[MeasuredRow]
SAME = "="  #: marks two rows that the images cannot tell apart
KEPT = "*"  #: marks a row that was measured for another report
#: Of a gap, each in a column of the CSV file.
GAPS = ("to_best", "to_own")
#: Fields that a cell of the CSV file cannot hold, or that say nothing there.
NOT_IN_CSV = {"identity", "fid_blocks", "fid_others", "pictures", "statistics", "schema", *GAPS}


def columns(rows: Rows) -> dict[str, list[str]]:
    """Title and cells, in plain text, of every column that any of the ordered rows fills."""
    cells = {title: [cell(row, rows) for row in rows] for title, cell in _columns(rows).items()}
    return {title: column for title, column in cells.items() if any(column)}


def caption(rows: Rows) -> str:
    """What the numbers of ordered rows are, in words."""
    first, n = rows[0].identity.harness, rows[0].n
    return (
        f"Model {first.model}; FID by detector **{first.detector}** against "
        f"{first.reference} ({first.reference_n} images); seeds {first.seeds} in every "
        f"row (N = {n}); blocks: mean +- standard deviation over "
        f"{first.blocks} disjoint blocks of {n // first.blocks}, whose FID is higher because they "
        f"are smaller. {_of_excess(rows)}images/s is sampling alone. {_of_converged(rows)} "
        f"{_of_gaps(rows)}{_of_kept(rows)}"
    )


def markdown(rows: Rows) -> str:
    """Caption and table of ordered rows."""
    shown = columns(rows)
    cells = zip(*shown.values(), strict=True)
    return "\n".join([caption(rows), "", *markdown_table(list(shown), cells, rows)]) + "\n"


def csv_text(rows: Rows) -> str:
    """The plain fields of ordered rows, and the parts of their gaps."""
    names = [field.name for field in fields(MeasuredRow) if field.name not in NOT_IN_CSV]
    others = _others(rows)
    if not _has_converged(rows):
        names.remove("fid_converged")
    parts = [(key, field.name) for key in GAPS for field in fields(Gap)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    gap_names = (f"{key}_{part}" for key, part in parts)
    writer.writerow([*names, *gap_names, *(f"fid_{name}" for name in others)])
    for row in rows:
        gaps = [getattr(getattr(row, key), part, None) for key, part in parts]
        plain = (getattr(row, name) for name in names)
        writer.writerow([*plain, *gaps, *(row.fid_others or ())])
    return out.getvalue()


def _others(rows: Rows) -> list[str]:
    """The names of the detectors beside the first one."""
    return [other.detector for other in rows[0].identity.harness.others or ()]


def _has_converged(rows: Rows) -> bool:
    """Whether every row has a second FID, to the model's own converged samples."""
    return all(row.fid_converged is not None for row in rows)


def _of_excess(rows: Rows) -> str:
    ceiling = heun_ceiling(rows)
    if ceiling is None or all(row.excess is None for row in rows):
        return ""
    return f"Excess: the share of {YARDSTICK}'s distance from {ceiling.method} that is left. "


def _of_gaps(rows: Rows) -> str:
    if not any(row.to_best for row in rows):
        return "There are too few images to say which rows differ."
    return (
        "To best, vs own solver: difference +- its standard error, paired over the seeds that all "
        f"rows share; '{SAME}' behind it: these {rows[0].n} images cannot tell the two apart "
        f"(p >= {LEVEL:g}; to best: corrected for the number of rows); blank: not tested."
    )


def _of_kept(rows: Rows) -> str:
    if not any(row.kept for row in rows):
        return ""
    return (
        f" {KEPT}: measured earlier with the same model, sampler, seeds, detector, dtype and kind "
        "of device; --no_cache measures it again."
    )


def _of_converged(rows: Rows) -> str:
    second = rows[0].identity.harness.converged
    if second is None or not _has_converged(rows):
        return (
            "There is no FID to the model's own converged samples: no statistics of those were "
            "given or are bundled (tools.converged makes them)."
        )
    return (
        f"FID to converged: against {second.n} samples of the model itself by {second.solver} "
        f"at a tolerance of {second.tol:g} (seeds {second.seeds}), the model's error set aside."
    )


def _own_solver(row: MeasuredRow, rows: Rows) -> str:
    own = own_solver_row(row, rows)
    if own is None:
        return ""
    text = f"{row.fid - own.fid:+.2f}" if row.to_own is None else _gap(row.to_own)
    return f"{text} ({own.method})"


def _to_best(row: MeasuredRow, rows: Rows) -> str:
    if row.to_best is not None:
        return _gap(row.to_best)
    others = [other for other in rows if other.budget == row.budget and other is not row]
    first = row.budget is not None and all(other.fid >= row.fid for other in others)
    return "best" if first and any(other.to_best for other in others) else ""


def _gap(gap: Gap) -> str:
    same = f" {SAME}" if gap.p >= LEVEL else ""
    return f"{gap.difference:+.2f} +- {gap.error:.2f}{same}"


def _converged(row: MeasuredRow, rows: Rows) -> str:
    return f"{row.fid_converged:.2f}" if _has_converged(rows) else ""


def _columns(rows: Rows) -> dict[str, Cell]:
    """`COLUMNS`, and after the FID that by each of the other detectors."""

    def fid(place: int) -> Cell:
        return lambda row, _: f"{row.fid_others[place]:.2f}" if row.fid_others else ""

    others = {f"FID ({name})": fid(place) for place, name in enumerate(_others(rows))}
    shown = list(COLUMNS.items())
    after = list(COLUMNS).index("FID") + 1
    return dict([*shown[:after], *others.items(), *shown[after:]])


Cell = Callable[[MeasuredRow, Rows], str]
#: The columns of every table, by title: the cell of a row among ordered rows.
COLUMNS: dict[str, Cell] = {
    "method": lambda row, _: f"{row.method} {KEPT}" if row.kept else row.method,
    "NFE": lambda row, _: str(row.nfe_planned),
    "FID": lambda row, _: f"{row.fid:.2f}",
    "FID to converged": _converged,
    "to best": _to_best,
    "blocks": lambda row, _: f"{row.fid_block_mean:.2f} +- {row.fid_block_spread:.2f}",
    "excess": lambda row, _: "" if row.excess is None else f"{row.excess:.2f}",
    "vs own solver": _own_solver,
    "images/s": lambda row, _: "" if row.kept else f"{row.images_per_second:.1f}",
    "NFE metered": lambda row, _: str(row.nfe_metered),
    "detail": lambda row, _: row.detail,
}
