"""Where results go: found to be writable before the work, and used by one run at a time."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.dist import World
from runtime.errors import UserError, reason
from runtime.files import EXTENSIONS, remove_leftovers
from runtime.log import note
from runtime.record import RECORD, RunRecord

LOCK = ".lock"
ATTEMPTS = 1000  #: to lock a file that other runs keep removing


@contextmanager
def claimed(folder: str | Path, here: World, *commands: str) -> Iterator[None]:
    """``with claimed(outdir, here):`` the folder, made where needed, for this run alone.

    ``commands`` are those whose record the folder may have.  Only rank 0 looks at the folder.
    Raises UserError if it cannot be written, if another run is using it, and, where ``commands``
    are given, if it has the record of another command or images without a record.  What killed runs
    were writing there is removed, and so is a new folder in which the block leaves nothing.
    """
    if not here.is_main:
        yield
        return
    path = Path(folder)
    new = not path.exists()
    try:
        with locked(path / LOCK, folder):
            if commands:
                _check_record(path, commands)
            remove_leftovers(path)
            yield
    finally:
        if new:
            with suppress(OSError):  # it does not exist, or holds results
                path.rmdir()


@contextmanager
def locked(path: Path, what: str | Path) -> Iterator[None]:
    """Lock ``what`` against other processes by the file ``path``, which is removed at the end.

    The lock belongs to the process, so it goes with it, however that ends; an empty file that a
    killed process leaves behind locks nothing.  Raises UserError as `claimed` does.
    """
    descriptor = _lock(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: nobody else has this file
        os.close(descriptor)


def check_name(flag: str, name: str) -> None:
    """Raise UserError unless ``name`` may be a part of the name of a folder of results."""
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name):
        raise UserError(
            f"{flag} {name[:99]!r} cannot name folders of results: give up to 100 letters, digits, "
            "spaces and . + - _, of which the first is a letter or a digit"
        )


def check_writable(path: str | Path, flag: str) -> None:
    """Raise UserError unless a file or folder can be made at ``path``; nothing is left behind."""
    full = Path(path).absolute()
    places = full.parents if full.is_file() else (full, *full.parents)
    folder = next(place for place in places if place.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({folder}: {reason(error)}): give another"
        ) from None
    if not full.is_dir():
        remove_leftovers(full)


def check_file(path: str | Path | None, flag: str, here: World) -> None:
    """Raise UserError, on rank 0, unless the file ``path``, if one is asked for, can be written."""
    if path is None or not here.is_main:
        return
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder: give the name of a file")
    check_writable(path, flag)


def _lock(path: Path, what: str | Path) -> int:
    """The descriptor of the locked file."""
    for _ in range(ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed between our two steps, being empty
            continue
        except OSError as error:
            raise UserError(
                f"{what} cannot be written ({reason(error)}): give another place for the results"
            ) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise UserError(
                f"{what} is in use by another run: wait until that ends, or give another place"
            ) from None
        except OSError as error:  # a file system without locks
            note(f"note: {what} cannot be locked ({reason(error)}): start no second run there")
            return descriptor
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its owner ended and removed it between our two steps
    raise UserError(f"{what} cannot be locked: give another place for the results")


def _check_record(folder: Path, commands: Sequence[str]) -> None:
    file = folder / RECORD
    if not file.exists():
        endings = {path.suffix.lower() for path in folder.iterdir()}
        if endings & EXTENSIONS and ".json" not in endings:  # results have JSON beside their plots
            raise UserError(f"{folder} holds images but no {RECORD}: give another folder")
        return
    other = RunRecord.read(file).command
    if other not in commands:
        raise UserError(
            f"{folder} holds the results of another command, {other}, with their record: give "
            "another folder"
        )
