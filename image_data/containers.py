"""Folders and zips as the same thing: files by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

MOST_BYTES = 1 << 29  #: of a file in a zip: the table of 10 million classes


class FileContainer:
    """The files in a zip, or in a folder and its sub-folders; threads may share it.

    Raises OSError, or BadZipFile if ``path`` is neither.
    """

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()  # a zip has one reading position
        self._zip = None if path.is_dir() else ZipFile(path)
        if self._zip is None:
            self.names = list(_below(path, follow_links))
        else:
            self.names = [name for name in self._zip.namelist() if not name.endswith("/")]

    @property
    def is_zip(self) -> bool:
        return self._zip is not None

    def __enter__(self) -> FileContainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if self._zip is None:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read()
        with self._lock:
            if self._zip.getinfo(name).file_size > MOST_BYTES:
                raise ValueError(f"it would unpack to more than {MOST_BYTES} bytes")
            return self._zip.read(name)


def _below(folder: Path, follow_links: bool) -> Iterator[str]:
    """All files below ``folder``, as relative names with slashes."""

    def stop(error: OSError) -> None:
        raise error

    # ten times as fast as Path.rglob
    for place, _, files in os.walk(folder, onerror=stop, followlinks=follow_links):
        inner = Path(place).relative_to(folder).as_posix()
        yield from files if inner == "." else (f"{inner}/{file}" for file in files)
