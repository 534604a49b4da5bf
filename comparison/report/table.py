"""The report of a comparison: JSON, Markdown, CSV, a plot and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from comparison.report.plots import against_nfe, legend, save, series, short
from metrics.paired import LEVEL
from runtime.files import write_text
from runtime.images import image_grid, save_png
from runtime.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZOOM = 2  #: small images are shown larger
#: What the excess of a row is measured by: no solver error to speak of, and a good plain solver.
CEILING, YARDSTICK = "Heun-35", "iPNDM(4) + AFS"
SAME = "="  #: marks two rows that the images cannot tell apart
TESTS = ("to_best", "to_own")


def write_report(folder: Path, record: RunRecord, results: list[dict[str, Any]]) -> list[Path]:
    """Write all six files into ``folder``; returns their paths, the table first."""
    listed = ordered(results)
    rows = [{**row, "excess": excess(row, listed)} for row in listed]
    text = {
        "table.md": markdown(rows),
        "table.csv": _csv(rows),
        "results.json": json.dumps(
            {"record": json.loads(record.to_json()), "rows": rows}, indent=2
        ),
        "fid-nfe.json": json.dumps(_points(rows), indent=2),
    }
    for name, content in text.items():
        write_text(folder / name, content)
    save(folder / "fid-nfe.png", lambda figure: _plot(figure, rows))
    _picture(folder / "grid.png", folder, rows)
    return [folder / name for name in (*text, "fid-nfe.png", "grid.png")]


def ordered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By budget, the best row of each first; ceilings last."""
    return sorted(results, key=lambda r: (r["budget"] is None, r["budget"] or 0, r["fid"]))


def columns(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Title and cells, in plain text, of every column that any of the ordered rows fills."""
    made = {title: [cell(row, rows) for row in rows] for title, cell in COLUMNS.items()}
    return {title: cells for title, cells in made.items() if any(cells)}


def _held_against_model(rows: list[dict[str, Any]]) -> bool:
    """Whether there is a second FID, that to the model's own converged samples."""
    return all("fid_converged" in row for row in rows)


def _told_apart(rows: list[dict[str, Any]]) -> bool:
    """Whether any two rows could be compared image by image."""
    return any(row.get("to_best") for row in rows)


def caption(rows: list[dict[str, Any]]) -> str:
    """What the figures of ordered rows are, in words."""
    first = rows[0]["identity"]["harness"]
    per_block = rows[0]["n"] // first["blocks"]
    return (
        f"Model {first['model']}; FID by detector **{first['detector']}** against "
        f"{first['reference']} ({first['reference_n']} images); seeds {first['seeds']} in every "
        f"row (N = {rows[0]['n']}); blocks: mean +- standard deviation over "
        f"{first['blocks']} disjoint blocks of {per_block}, whose FID is higher because they are "
        f"smaller. {_of_excess(rows)}images/s is sampling alone. {_second_reference(rows)} "
        f"{_test(rows)}"
    )


def _of_excess(rows: list[dict[str, Any]]) -> str:
    if all(excess(row, rows) is None for row in rows):
        return ""
    return f"Excess: the share of {YARDSTICK}'s distance from {CEILING} that is left. "


def _test(rows: list[dict[str, Any]]) -> str:
    if not _told_apart(rows):
        return "There are too few images to say which rows differ."
    return (
        "To best, vs own solver: difference +- its standard error, paired over the seeds that all "
        f"rows share; '{SAME}' behind it: these {rows[0]['n']} images cannot tell the two apart "
        f"(p >= {LEVEL:g}; to best: corrected for the number of rows); blank: not tested."
    )


def _second_reference(rows: list[dict[str, Any]]) -> str:
    if not _held_against_model(rows):
        return (
            "There is no FID to the model's own converged samples, since no statistics of those "
            "were given or come along (tools.converged makes them)."
        )
    made = rows[0]["identity"]["harness"]["converged"]
    return (
        f"FID to converged: against {made['n']} samples of the model itself by {made['solver']} "
        f"at a tolerance of {made['tol']:g} (seeds {made['seeds']}), the model's error set aside."
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of ordered rows."""
    shown = columns(rows)
    lines = [
        caption(rows),
        "",
        "| " + " | ".join(shown) + " |",
        "|" + "|".join("---" if t in ("method", "detail") else "---:" for t in shown) + "|",
    ]
    for row, cells in zip(rows, zip(*shown.values(), strict=True), strict=True):
        name, *rest = (cell.replace("|", "\\|") for cell in cells)
        name = f"**{name}**" if row["group"] == "learned" else name
        lines.append("| " + " | ".join((name, *rest)) + " |")
    return "\n".join(lines) + "\n"


def excess(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """How much of a solver error is left: 1 is iPNDM(4) + AFS at this NFE, 0 is Heun-35.

    ``(FID - FID of Heun-35) / (FID of iPNDM(4) + AFS - FID of Heun-35)``, which sets the error of
    the model aside.  None without either row, and where the yardstick is no worse than the
    ceiling, so that there is nothing to be measured by.
    """
    ceiling = next((r for r in rows if r["budget"] is None and r["method"] == CEILING), None)
    same = (r for r in rows if r["budget"] == row["budget"] and r["method"] == YARDSTICK)
    yardstick = next(same, None)
    if row["budget"] is None or ceiling is None or yardstick is None:
        return None
    whole = yardstick["fid"] - ceiling["fid"]
    return (row["fid"] - ceiling["fid"]) / whole if whole > 0 else None


def own_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The classic row of the same budget that a student, or Restart, is held against."""
    same = (r for r in rows if r["budget"] == row["budget"] and r["method"] == row["own_solver"])
    return next(same, None)


def _gain(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    own = own_row(row, rows) if row["own_solver"] else None
    if own is None:
        return ""
    tested = row.get("to_own")
    text = f"{row['fid'] - own['fid']:+.2f}" if tested is None else _gap(tested)
    return f"{text} ({own['method']})"


def _to_best(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if row.get("to_best"):
        return _gap(row["to_best"])
    others = [r for r in rows if r["budget"] == row["budget"] and r is not row]
    first = row["budget"] is not None and all(r["fid"] >= row["fid"] for r in others)
    return "best" if first and any(r.get("to_best") for r in others) else ""


def _gap(found: dict[str, float]) -> str:
    same = f" {SAME}" if found["p"] >= LEVEL else ""
    return f"{found['difference']:+.2f} +- {found['error']:.2f}{same}"


def _converged(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    return f"{row['fid_converged']:.2f}" if _held_against_model(rows) else ""


def _excess(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    left = excess(row, rows)
    return "" if left is None else f"{left:.2f}"


#: The columns of every table, by title: the cell of a row among ordered rows.
COLUMNS: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], str]] = {
    "method": lambda row, _: row["method"],
    "NFE": lambda row, _: str(row["nfe_planned"]),
    "FID": lambda row, _: f"{row['fid']:.2f}",
    "FID to converged": _converged,
    "to best": _to_best,
    "blocks": lambda row, _: f"{row['fid_block_mean']:.2f} +- {row['fid_block_spread']:.2f}",
    "excess": _excess,
    "vs own solver": _gain,
    "images/s": lambda row, _: f"{row['images_per_second']:.1f}",
    "NFE metered": lambda row, _: str(row["nfe_metered"]),
    "detail": lambda row, _: row["detail"],
}


def _csv(rows: list[dict[str, Any]]) -> str:
    flat = [_flat(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what no cell can hold."""
    apart = ("identity", "fid_blocks", "pictures", "statistics", *TESTS)
    plain = {key: value for key, value in row.items() if key not in apart}
    for test in TESTS:
        for part in ("difference", "error", "p"):
            plain[f"{test}_{part}"] = (row.get(test) or {}).get(part)
    return plain


def _plot(figure: Figure, rows: list[dict[str, Any]]) -> None:
    figure.set_size_inches(9, 4.5)
    title = f"FID ({rows[0]['detector']}, N = {rows[0]['n']})"
    against_nfe(figure.add_subplot(), rows, "fid", title, "fid_block_spread")
    legend(figure)


def _points(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the plot shows: the points of each line."""
    names = {"nfe": "nfe_planned", "fid": "fid", "spread": "fid_block_spread", "detail": "detail"}
    return {
        label: [{name: row[key] for name, key in names.items()} for row in group]
        for label, group in series(rows).items()
    }


def _picture(path: Path, folder: Path, rows: list[dict[str, Any]]) -> None:
    """The same seeds down the columns, a row per method."""
    strips = [np.asarray(Image.open(folder / row["pictures"]).convert("RGB")) for row in rows]
    side = strips[0].shape[0]
    images = [
        strip[:, i : i + side].repeat(ZOOM, 0).repeat(ZOOM, 1)
        for strip in strips
        for i in range(0, strip.shape[1], side)
    ]
    columns = strips[0].shape[1] // side
    seed = int(rows[0]["identity"]["harness"]["seeds"].split("-")[0])
    save_png(
        path,
        image_grid(
            images,
            columns,
            labels=[f"seed {seed + i}" for i in range(columns)],
            row_labels=[f"{short(r)}, {r['nfe_planned']} NFE, FID {r['fid']:.2f}" for r in rows],
        ),
    )
