"""Atomic writes, hashes and downloads of files."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime.errors import UserError

EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".webp"})  #: of images
CACHE = "AMED_CACHE"  #: environment variable with the folder for downloads
CHUNK = 1 << 20  #: bytes read at a time
TIMEOUT = 60.0  #: seconds without data before a download fails
#: Names of files that are not whole; see `temporary_name` and `share`.
TEMPORARY = re.compile(
    r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<process>[0-9]{1,18})-[0-9a-f]{8}\.tmp(\.mode\.tmp)?"
)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success it is renamed to ``path``.

    The folder is created if needed. If the block raises, the temporary file is removed and an
    existing ``path`` is left unchanged; a full disk is a UserError. The temporary name starts with
    a dot and ends in ``.tmp``, so that a file left behind by a killed process is never mistaken for
    a result; `remove_leftovers` finds it. Pass the format to writers that infer it from the name
    (PIL, matplotlib), and an open file to ``numpy.savez``, which appends to the name.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name, os.getpid()))
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if not temporary.exists():
                raise RuntimeError(
                    f"nothing was written to {temporary}: did the writer append a suffix?"
                )
            share(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_name(name: str, process: int) -> str:
    """What ``process`` of this machine calls the file ``name`` until it is whole."""
    return f".{name}.{_machine()}-{process}-{secrets.token_hex(4)}.tmp"


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left of the file or folder ``path``.

    Nothing that may still be written is touched.
    """
    own = f".{glob.escape(path.name)}.*.tmp"
    for file in path.rglob(".*.tmp") if path.is_dir() else path.parent.glob(own):
        match = TEMPORARY.fullmatch(file.name)
        if match and match["machine"] == _machine() and not _is_running(int(match["process"])):
            with suppress(OSError):  # litter is no reason to stop
                file.unlink()


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Raise UserError, with the path and the free space, where the disk is full."""
    try:
        yield
    except Exception as error:  # safetensors and torch have errors of their own
        if not _is_full(error):
            raise
        parent = next(folder for folder in Path(path).absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free / 2**20
        raise UserError(
            f"{path} cannot be written, the disk is full ({free:.1f} MiB are free): make room "
            "and run again"
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and torch's older format pass the system's words on; the newer one's writer only
    # notices that its file is too short
    return any(words in str(error) for words in ("No space left", "Disk quota", "inline_container"))


def share(path: Path) -> None:
    """Let others read a file that its writer made for its owner alone, as far as the umask does.

    safetensors writes all files so.
    """
    if stat.S_IMODE(path.stat().st_mode) == 0o600:
        fresh = path.with_name(f"{path.name}.mode.tmp")
        fresh.touch()  # reading the umask itself would change it for other threads
        try:
            path.chmod(stat.S_IMODE(fresh.stat().st_mode))
        finally:
            fresh.unlink()


def require_readable(path: str | Path) -> None:
    """Raise the system's own OSError for a file that cannot be opened.

    safetensors calls every such file a missing one.
    """
    with open(path, "rb"):
        pass


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` atomically, ending in exactly one newline."""
    with atomic_write(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON atomically."""
    write_text(path, json.dumps(content, indent=1))


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder(folder: str | Path | None = None) -> Path:
    """The folder for downloads: ``folder``, else $AMED_CACHE, else ~/.cache/amed-toolkit."""
    return Path(folder or os.environ.get(CACHE) or Path.home() / ".cache" / "amed-toolkit")


def download(url: str, folder: str | Path, sha256: str | None = None) -> Path:
    """Download ``url`` into ``folder``, unless it is there, and return the file's path.

    An interrupted transfer leaves ``<name>.part`` behind, and the next call continues it.
    If ``sha256`` is None, the hash of the first download is kept in ``<name>.sha256``.
    Every later call checks the file against one of the two. Call this on one rank only.

    Raises:
        UserError: no connection, an interrupted transfer, or a file with another hash.
    """
    name = _file_name(url)
    path = Path(folder) / name
    hash_file = path.with_name(f"{name}.sha256")
    if path.is_file():
        _check_cached(path, sha256, hash_file, url)
        return path
    part = path.with_name(f"{name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(url, part)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{name} could not be downloaded from {url} ({reason}): run again to continue, "
            f"or download it elsewhere and put it into {path.parent}"
        ) from error
    actual = sha256_file(part)
    if sha256 is not None and actual != sha256:
        part.unlink()
        raise UserError(
            f"{name} from {url} has the SHA-256 {actual[:12]}... where {sha256[:12]}... was "
            f"expected: get the right file and put it into {path.parent}"
        )
    if sha256 is None:
        write_text(hash_file, actual)
    os.replace(part, path)
    return path


def is_cached(url: str, folder: str | Path) -> bool:
    """Whether `download` has fetched ``url`` into ``folder`` before."""
    return (Path(folder) / _file_name(url)).is_file()


def _file_name(url: str) -> str:
    return Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name


def _check_cached(path: Path, sha256: str | None, hash_file: Path, url: str) -> None:
    if sha256 is None and not hash_file.is_file():
        return
    expected = sha256 or hash_file.read_text().strip()
    actual = sha256_file(path)
    if actual != expected:
        raise UserError(
            f"{path} has the SHA-256 {actual[:12]}... where {expected[:12]}... was expected: "
            f"delete it and it will be downloaded again from {url}"
        )


def _fetch(url: str, part: Path) -> None:
    """Append the missing rest of ``url`` to ``part``."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: the part is longer than this file
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
