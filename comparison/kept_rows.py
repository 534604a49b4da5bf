"""Rows that every comparison can take over: those bundled, and those this user has measured.

A row is known by its `RowIdentity` and by the version of this toolkit.  Only rows of our own
samplers are kept: a learned one belongs to its run, a library's to the version of the library.
The choices of Restart's plans lie in the same folders (`plan_search.halving.search`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from comparison.results import MeasuredRow, RowIdentity, of_features
from comparison.rows import Row
from runtime.errors import UserError
from runtime.files import atomic_write, cache_folder, remove_leftovers
from runtime.log import note
from runtime.typed import digest, write_result

BUNDLED = Path(__file__).with_name("bundled")
FOLDER = "rows"  #: in the cache
GROUPS = ("classic", "restart", "ceiling")  #: of the rows that are kept


@dataclass(frozen=True)
class KeptRows:
    """Folders with kept rows; rows are added to the last one."""

    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, cache_dir: str | None) -> KeptRows:
        """The bundled rows and those in the cache, see :func:`runtime.files.cache_folder`."""
        return cls((BUNDLED, cache_folder(cache_dir) / FOLDER))

    def places(self, row: Row, identity: RowIdentity) -> Iterator[Path]:
        """Where this row may lie: the paths of its numbers."""
        if row.group in GROUPS:
            for folder in self.folders:
                yield place(identity, folder)

    def add(self, row: Row, measured: MeasuredRow, folder: Path) -> None:
        """Keep a measured row, whose files lie in ``folder``."""
        if row.group in GROUPS and self.folders:
            try:
                remove_leftovers(self.folders[-1])
                keep(measured, folder, self.folders[-1])
            except (OSError, UserError) as error:
                note(f"{row.method} is not kept for other comparisons: {error}")


def place(identity: RowIdentity, folder: Path) -> Path:
    """Where the numbers of a row lie in a folder of kept ones."""
    # all that decides its features; the other detectors and references may be others
    name = digest(of_features(identity))
    return folder / f"nfe{identity.sampler['nfe_planned']:03d}-{name}.json"


def keep(measured: MeasuredRow, folder: Path, dest: Path) -> None:
    """Copy the files of a measured row from ``folder`` to ``dest``, its numbers last."""
    numbers = place(measured.identity, dest)
    named = replace(measured, pictures=f"{numbers.stem}.png", statistics=f"{numbers.stem}.npz")
    copy_files(measured, folder, named, dest)
    write_result(numbers, named)


def copy_files(measured: MeasuredRow, folder: Path, copied: MeasuredRow, dest: Path) -> None:
    """Copy statistics and pictures of a row from ``folder`` to where ``copied`` has them."""
    pairs = ((measured.statistics, copied.statistics), (measured.pictures, copied.pictures))
    for source, target in pairs:
        if source is not None and target is not None:
            with atomic_write(dest / target) as temporary:
                shutil.copyfile(folder / source, temporary)
