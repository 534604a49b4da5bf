"""The files that hold pickles: bare ones, PyTorch's two formats, and archives of such files."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import torch
from torch import Tensor

from checkpoints.pickles.allowed import Storage
from checkpoints.pickles.machine import Budget, Machine
from checkpoints.pickles.records import Refusal, shown
from runtime.errors import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  #: how PyTorch's older format begins
RATIO = 20  #: how far an archive may compress a member; weights hardly shrink at all


def read(path: str | Path, member: str | None = None) -> Any:
    """What a checkpoint holds, as a tree of plain data.

    The tree consists of dicts, lists, tuples, sets, text, bytes, numbers, tensors on the CPU
    (parameters too), numpy arrays, and :class:`Record` and :class:`Reference` for objects and
    classes.  Containers may occur at several places, or in themselves.  Where ``path`` is a zip
    archive of several checkpoints, ``member`` says which one.

    Raises UserError, in one sentence, for a file that is missing, damaged, of another kind, or
    names anything outside the allow-list; nothing that it names is imported or run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; check its name")
    try:
        with open(path, "rb") as file:
            return _read_open(file, member)
    except Exception as error:  # damaged bytes fail in every step, each in its own way
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        problem = f"is damaged, cut short or no checkpoint ({reason}); fetch it again"
        if isinstance(error, Refusal):
            problem = (
                f"{error}, which no published checkpoint does; nothing in it was run: get the file "
                "from its authors"
            )
        raise UserError(f"{path} {problem}") from None


def _read_open(file: IO[bytes], member: str | None = None, inside: bool = False) -> Any:
    """``inside``: the file came out of an archive, and may not be another archive of files."""
    head, size = file.read(512), os.fstat(file.fileno()).st_size
    if not head or head.lstrip().startswith(b"<"):
        raise ValueError("it is a web page or XML" if head else "it is empty")
    if not head.startswith(b"PK"):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_pickles(mapped, Budget(size))  # type: ignore[arg-type]
    with ZipFile(file) as archive:
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("data.pkl")]
        if len(roots) == 1:
            return _read_zip(archive, roots[0], size)
        if inside:
            raise ValueError("it is an archive in an archive")
        return _read_member(archive, member)


def _read_pickles(
    file: IO[bytes],
    budget: Budget,
    contents: Callable[[str, Tensor], bytes] | None = None,
    nested: bool = False,
) -> Any:
    """A pickle and the contents of its storages, by key, or PyTorch's older format.

    That is five pickles, the fourth of which holds all, and then the contents.
    """
    storages: dict[str, Storage] = {}
    machine = partial(Machine, budget, storages, None if nested else partial(_read_nested, budget))

    def following(key: str, data: Tensor) -> bytes:
        if file.read(8) != struct.pack("<q", data.numel()):
            raise ValueError(f"it has not {data.numel()} elements for the storage {shown(key)}")
        return file.read(data.nbytes)

    content, keys = machine().run(file), sorted(storages) if contents else []
    if type(content) is int and content == MAGIC:
        protocol, system, content, keys = (machine().run(file) for _ in range(4))
        if protocol != PROTOCOL or system.get("little_endian") is not True:
            raise ValueError("it is in another version or byte order of PyTorch's older format")
    if keys != sorted(storages):
        raise EOFError("its storages have no contents")
    for key, storage in sorted(storages.items()):
        given = (contents or following)(key, storage.data)
        if len(given) != storage.data.nbytes:
            raise EOFError(f"a storage of {storage.data.nbytes} bytes has {len(given)}")
        if given:
            storage.data.view(torch.uint8).numpy()[:] = np.frombuffer(given, np.uint8)
    if file.read(1):
        raise ValueError("it goes on after its end")
    return content


def _read_nested(budget: Budget, data: bytes) -> Storage:
    """A storage that was pickled by itself, as bytes in PyTorch's older format."""
    storage = _read_pickles(BytesIO(data), budget, nested=True)
    if type(storage) is not Storage:
        raise Refusal(f"holds a {type(storage).__name__} where a storage belongs")
    return storage


def _read_zip(archive: ZipFile, root: str, size: int) -> Any:
    """PyTorch's present format: ``<root>data.pkl`` and ``<root>data/<key>``, not compressed."""
    names = archive.namelist()
    if f"{root}constants.pkl" in names:
        raise ValueError("it is a TorchScript program")
    if f"{root}byteorder" in names and _stored(archive, f"{root}byteorder", 16) != b"little":
        raise ValueError("it is in big-endian order")

    def contents(key: str, data: Tensor) -> bytes:
        return _stored(archive, f"{root}data/{key}", data.nbytes)

    pickle = BytesIO(_stored(archive, f"{root}data.pkl", size))
    return _read_pickles(pickle, Budget(size), contents)


def _stored(archive: ZipFile, name: str, most: int) -> bytes:
    """A member that is not compressed, of at most so many bytes; its check sum is checked."""
    info = archive.getinfo(name)
    if info.compress_type != ZIP_STORED or info.file_size > most:
        raise ValueError(f"{shown(name)} is compressed or has more than {most} bytes")
    return archive.read(info)


def _read_member(archive: ZipFile, member: str | None) -> Any:
    """One checkpoint out of an archive of files, by way of a temporary file."""
    found = [i for i in archive.infolist() if i.filename.endswith((".ckpt", ".pt", ".pth", ".pkl"))]
    if member is not None:
        found = [i for i in found if member in (i.filename, Path(i.filename).name)]
    if len(found) != 1:
        names = ", ".join(shown(name) for name in archive.namelist()[:8]) or "nothing"
        raise ValueError(f"not one {member or 'checkpoint'} but {len(found)} among {names}")
    (info,) = found
    if info.file_size > RATIO * info.compress_size or info.compress_type > ZIP_DEFLATED:
        raise ValueError(
            f"{shown(info.filename)} would unpack from {info.compress_size} to {info.file_size} "
            "bytes"
        )
    with tempfile.TemporaryFile() as file, archive.open(info) as source:
        copyfileobj(source, file, 1 << 20)
        file.seek(0)
        return _read_open(file, inside=True)
