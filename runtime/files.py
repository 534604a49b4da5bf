"""Files that are either whole or absent: atomic writes, hashes, downloads."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime.errors import UserError

CACHE = "AMED_CACHE"  #: environment variable: where downloads live
CHUNK = 1 << 20  #: bytes read at a time
TIMEOUT = 60.0  #: seconds without a byte before a download is given up


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path`` in one step.

    The folder is made if needed. If the block raises, the temporary file is removed and an
    older ``path`` stays as it was. The temporary name starts with a dot and ends in ``.tmp``,
    so that one left behind by a killed process is never taken for a result; writers that guess
    the format from the name (PIL, matplotlib) have to be told it, and ``numpy.savez``, which
    appends to the name, has to be given an open file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if not temporary.exists():
            raise RuntimeError(
                f"nothing was written to {temporary}: did the writer append a suffix?"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` in one step; it ends in one line feed."""
    with atomic_write(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON in one step."""
    write_text(path, json.dumps(content, indent=1))


def read_earlier(path: Path) -> dict[str, Any] | None:
    """A result that says what it is of (``identity``), or None where none can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "identity" in content else None


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder(given: str | Path | None = None) -> Path:
    """Where downloads live: ``given``, else $AMED_CACHE, else ~/.cache/amed-toolkit."""
    return Path(given or os.environ.get(CACHE) or Path.home() / ".cache" / "amed-toolkit")


def download(url: str, folder: str | Path, sha256: str | None = None) -> Path:
    """Fetch ``url`` into ``folder`` once and return the file's path.

    A broken transfer leaves ``<name>.part`` behind and the next call carries on from there.
    Where no ``sha256`` is known, the hash of the first download is kept in ``<name>.sha256``;
    every later call checks the file against the one or the other. Call it on one rank only.

    Raises:
        UserError: no connection, a broken transfer, or a file with another hash.
    """
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name
    path = Path(folder) / name
    noted = path.with_name(f"{name}.sha256")
    if path.is_file():
        found = sha256_file(path)
        known = sha256 or (noted.read_text().strip() if noted.is_file() else found)
        if found != known:
            raise UserError(
                f"{path} has the SHA-256 {found[:12]}... where {known[:12]}... was expected: "
                f"delete it and it will be fetched again from {url}"
            )
        return path
    part = path.with_name(f"{name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, part)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{name} could not be fetched from {url} ({reason}): run again to carry on, "
            f"or fetch it elsewhere and put it into {path.parent}"
        ) from error
    found = sha256_file(part)
    if sha256 is not None and found != sha256:
        part.unlink()
        raise UserError(
            f"{name} from {url} has the SHA-256 {found[:12]}... where {sha256[:12]}... was "
            f"expected: nothing was kept; fetch the right file and put it into {path.parent}"
        )
    if sha256 is None:
        with atomic_write(noted) as temporary:
            temporary.write_text(found + "\n")
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path) -> None:
    """Append what is missing of ``url`` to ``part``."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: the part is no beginning of this file
            raise
        error.close()
        part.unlink()
        have = 0
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    with response:
        _receive(response, part, have if response.status == 206 else 0)


def _receive(response: HTTPResponse, part: Path, have: int) -> None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    name = part.name.removesuffix(".part")
    with (
        open(part, "ab" if have else "wb") as file,
        tqdm(total=total, initial=have, desc=name, unit="B", unit_scale=True) as bar,
    ):
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")
