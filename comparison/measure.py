"""Measuring a row: the images of the shared seeds through one detector, kept on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison.kept_rows import KeptRows, copy_files
from comparison.results import MeasuredRow, RowIdentity, of_features
from comparison.rows import Row
from evaluation.harness import Harness, Measured
from metrics.summary import FeatureSummary
from runtime.files import atomic_write
from runtime.images import image_grid, save_png
from runtime.record import utc_now
from runtime.typed import read_earlier, to_plain, write_result

ROWS = "rows"  #: folder of the measured rows


def measure(
    row: Row,
    harness: Harness,
    folder: Path,
    tick: Callable[[int], object],
    kept: KeptRows | None = None,
) -> MeasuredRow:
    """The numbers of one row; read from ``folder``, or from ``kept``, if it was measured before.

    A row is one JSON file, written whole at its end, so a killed comparison loses one row at most.
    Its statistics and features lie beside it (see :meth:`FeatureSummary.load`): other metrics and
    references need no new samples.
    """
    kept = kept or KeptRows()
    file = folder / ROWS / f"{row.key}.json"
    identity = _identity(row, harness)
    here = harness.here
    found = _earlier(row, identity, harness, file, kept) if here.is_main else None
    earlier = here.broadcast_object(found)
    if earlier is not None:
        tick(len(harness.seeds))
        return earlier
    begin = time.perf_counter()
    measured = harness.fid(row.sampler, harness.seeds, harness.blocks, tick)
    result = _result(row, measured, identity, time.perf_counter() - begin)
    if here.is_main:
        images = harness.pictures(row.sampler)
        save_png(file.with_suffix(".png"), image_grid(images, columns=len(images)))
        with atomic_write(file.with_suffix(".npz")) as temporary:
            measured.summary.save(temporary)
        write_result(file, result)
        kept.add(row, result, folder)
    return result


def _identity(row: Row, harness: Harness) -> RowIdentity:
    described = to_plain(row.sampler.describe())  # equal to its copy on disk
    return RowIdentity(described, harness.identity, harness.precision, harness.here.device.type)


def _earlier(
    row: Row, identity: RowIdentity, harness: Harness, file: Path, kept: KeptRows
) -> MeasuredRow | None:
    """The row as it was measured before, here or elsewhere; from now on it lies in ``file``."""
    folder = file.parent.parent
    earlier = read_earlier(MeasuredRow, file)
    if earlier is not None and earlier.identity == identity:
        return earlier
    if earlier is not None:
        earlier = _with_new_references(earlier, identity, harness, folder)
    if earlier is None:
        earlier = _taken_over(row, identity, harness, folder, kept)
    if earlier is not None:
        write_result(file, earlier)
    return earlier


def _taken_over(
    row: Row, identity: RowIdentity, harness: Harness, folder: Path, kept: KeptRows
) -> MeasuredRow | None:
    """The row from among those kept, with its files copied to ``folder``; None without one."""
    for place in kept.places(row, identity):
        found = read_earlier(MeasuredRow, place)
        if found is not None:
            found = _with_new_references(found, identity, harness, place.parent)
        if found is not None:
            own = replace(found, kept=True, **_names(row))
            with suppress(FileNotFoundError):  # it has lost its pictures
                copy_files(found, place.parent, own, folder)
                return own
    return None


def _names(row: Row) -> dict[str, Any]:
    """What a row is called, and where its files lie in the folder of a comparison."""
    return {
        "method": row.method,
        "group": row.group,
        "budget": row.budget,
        "detail": row.detail,
        "own_solver": row.own_solver,
        "pictures": f"{ROWS}/{row.key}.png",
        "statistics": f"{ROWS}/{row.key}.npz",
    }


def _result(row: Row, measured: Measured, identity: RowIdentity, seconds: float) -> MeasuredRow:
    fid, converged = measured.fid, measured.converged
    return MeasuredRow(
        **_names(row),
        fid=fid.fid,
        fid_converged=None if converged is None else converged.fid,
        fid_others=measured.others or None,
        fid_block_mean=fid.mean,
        fid_block_spread=fid.spread,
        fid_blocks=tuple(fid.blocks),
        n=fid.n,
        nfe_planned=row.sampler.nfe,
        nfe_metered=measured.nfe,
        images_per_second=measured.images_per_second,
        seconds=seconds,
        detector=identity.harness.detector,
        identity=identity,
        created=utc_now(),
    )


def _with_new_references(
    earlier: MeasuredRow, identity: RowIdentity, harness: Harness, folder: Path
) -> MeasuredRow | None:
    """An earlier result of the same images, by the current detectors and second reference.

    None where its images are others, where it lacks one of the other detectors, and where the
    statistics on disk are not those of the result.
    """
    if of_features(earlier.identity) != of_features(identity) or earlier.statistics is None:
        return None
    had = dict(zip(earlier.identity.harness.others or (), earlier.fid_others or (), strict=True))
    wanted = identity.harness.others or ()
    if any(other not in had for other in wanted):
        return None
    try:
        moments = FeatureSummary.load(folder / earlier.statistics, harness.detector).moments
        fid = moments.fid(harness.reference)
    except (OSError, ValueError):
        return None
    if not math.isclose(fid, earlier.fid, rel_tol=1e-6, abs_tol=1e-6):  # of another run
        return None
    second = harness.converged
    converged = None if second is None else moments.fid(second.statistics)
    others = tuple(had[other] for other in wanted) or None
    return replace(earlier, fid_converged=converged, fid_others=others, identity=identity)
