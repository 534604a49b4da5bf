"""Logs of a run: JSON lines, printed text, a progress bar, TensorBoard.

Only rank 0 writes: call everything on every rank, with ``enabled=world.is_main``.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from runtime.dist import environment
from runtime.errors import UserError
from runtime.files import atomic_write, room_for
from runtime.typed import parse_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class JsonLines:
    """A file with one JSON object per line, each on disk when ``append`` returns.

    ``resume_after`` continues an existing file: rows with a larger ``step``, and an incomplete
    last line, are dropped first, so that a resumed run writes the same file as an uninterrupted
    one. Without it the file starts empty.
    """

    def __init__(
        self, path: str | Path, resume_after: int | None = None, enabled: bool = True
    ) -> None:
        self._file = None
        if not enabled:
            return
        path = Path(path)
        rows = read_json_lines(path) if resume_after is not None and path.exists() else []
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows if row["step"] <= resume_after)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; to be resumable, it needs an integer ``step``."""
        if self._file is not None:
            with room_for(self._file.name):
                self._file.write(_line(row))
                self._file.flush()

    def close(self) -> None:
        """Close the file; further rows are an error."""
        if self._file is not None:
            with room_for(self._file.name):  # what could not be written is tried once more
                self._file.close()


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file, without an incomplete last line (the process was killed).

    Raises:
        UserError: a line that is not JSON, or no object with a whole number ``step``.
    """
    rows = []
    lines = Path(path).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        remedy = "delete that line, or start the run again"
        row = parse_json(line, f"{path}, line {number}", remedy)
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int:
            raise UserError(f"{path}, line {number} is no row of a run with a 'step': {remedy}")
        rows.append(row)
    return rows


class TextLog:
    """Prints messages above the progress bar and appends them to a file."""

    def __init__(self, path: str | Path | None = None, enabled: bool = True) -> None:
        self._path = Path(path) if path is not None else None
        self._enabled = enabled

    def __call__(self, message: str) -> None:
        if not self._enabled:
            return
        tqdm.write(message)
        if self._path is not None:
            with room_for(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(message + "\n")


def note(text: str | None) -> None:
    """Print ``text``, if any, to stderr above a progress bar, on rank 0 only."""
    if text and environment()[0] == 0:
        tqdm.write(text, file=sys.stderr)


@functools.cache
def note_once(text: str | None) -> None:
    """As `note`, but an equal text is printed once in a process."""
    note(text)


def progress(
    total: int,
    description: str,
    unit: str = "it",
    initial: int = 0,
    enabled: bool = True,
    scale: bool = False,
) -> tqdm[Any]:
    """A progress bar on stderr; ``with progress(...) as bar: bar.update(n)``.

    It shows how long the rest takes if ``total`` counts equal pieces of work; ``scale`` writes
    thousands as k.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not enabled,
        unit_scale=scale,
        dynamic_ncols=True,
    )


def watch_batch(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """A callback of (state, states) that shows the progress within a batch, once a second."""
    last = time.monotonic()

    def watch(state: int, states: int) -> None:
        nonlocal last
        if time.monotonic() > last + 1:
            last = time.monotonic()
            bar.set_postfix_str(f"{state}/{states} of a batch")

    return watch


def tensorboard(
    folder: str | Path, resume_after: int | None = None, enabled: bool = True
) -> SummaryWriter | None:
    """A TensorBoard writer into ``folder``, or None if not enabled.

    Values that an interrupted run wrote for steps after ``resume_after`` are hidden.
    """
    if not enabled:
        return None
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    purge = None if resume_after is None else resume_after + 1
    seconds = {int(file.name.split(".")[3]) for file in Path(folder).glob("events.out.tfevents.*")}
    while int(time.time()) in seconds:  # files are read in the order of the times in their names
        time.sleep(0.02)
    return SummaryWriter(log_dir=str(folder), purge_step=purge)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
