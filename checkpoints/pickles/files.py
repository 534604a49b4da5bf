"""The files that hold pickles: bare ones, PyTorch's two formats, and archives of such files."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch

from checkpoints.pickles.allowed import CONSTRUCTORS, STORAGES, Storage
from checkpoints.pickles.machine import Machine
from checkpoints.pickles.records import Reference, Refusal, shown
from runtime.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  #: the first pickle of PyTorch's older format
PROTOCOL = 1001
REPEATS = 64  #: how often the tensors of a file may cover its bytes
RATIO = 100  #: how far an archive may compress a member; weights hardly shrink at all
NESTED = "torch.storage._load_from_bytes"
SUFFIXES = (".ckpt", ".pt", ".pth", ".pkl")
#: What reading damaged bytes may raise; anything else is a defect of this reader.
DAMAGE = (
    ArithmeticError, BadZipFile, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


def read(path: str | Path, member: str | None = None) -> Any:
    """What a checkpoint holds, as a tree of plain data.

    The tree consists of dicts, lists, tuples, sets, text, bytes, numbers, torch dtypes, tensors on
    the CPU (parameters too), numpy arrays, and :class:`Record` and :class:`Reference` for objects
    and classes.  Containers may occur at several places, or in themselves.  Where ``path`` is a zip
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
    except Refusal as refusal:
        raise UserError(
            f"{path} {refusal}, which no published checkpoint does; nothing in it was run: get "
            "the file from its authors"
        ) from None
    except DAMAGE as error:
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        raise UserError(
            f"{path} is damaged, cut short or no checkpoint ({reason}); fetch it again"
        ) from None


def _read_open(file: IO[bytes], member: str | None = None, inside: bool = False) -> Any:
    """``inside``: the file came out of an archive, and may not be another archive of files."""
    head = file.read(512)
    if not head:
        raise EOFError("it is empty")
    if head.lstrip().startswith(b"<"):
        raise ValueError("it is a web page or XML")
    size = os.fstat(file.fileno()).st_size
    if not head.startswith(b"PK"):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_pickles(mapped, size)  # type: ignore[arg-type]
    with ZipFile(file) as archive:
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("data.pkl")]
        if len(roots) == 1:
            return _read_zip(archive, roots[0], size)
        if inside:
            raise ValueError("it is an archive in an archive")
        return _read_member(archive, member)


class Storages:
    """Storages as a pickle declares them, at most ``size`` bytes together.

    Their contents come from ``fetch`` at once, or from :meth:`fill` after the pickle.
    """

    def __init__(self, size: int, fetch: Callable[[str, int], bytes] | None = None) -> None:
        self.left = size
        self.fetch = fetch
        self.known: dict[str, Storage] = {}
        self.empty: set[str] = set()

    def declare(self, persistent_id: Any) -> Storage:
        """Raises Refusal for an id of another form, EOFError for more than the file can hold."""
        dtype, key, count = _parse(persistent_id)
        if key not in self.known:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise EOFError("its storages are larger than the file")
            self.known[key] = Storage(torch.empty(count, dtype=dtype))
            self.empty.add(key)
            if self.fetch is not None:
                self.fill(key, self.fetch(key, count * dtype.itemsize))
        data = self.known[key].data
        if (data.dtype, data.numel()) != (dtype, count):
            raise Refusal(f"declares the storage '{shown(key)}' in two ways")
        return self.known[key]

    def fill(self, key: str, contents: bytes) -> None:
        """Give a storage that was declared its contents, once."""
        data = self.known[key].data
        if len(contents) != data.nbytes:
            raise EOFError(f"a storage of {data.nbytes} bytes has {len(contents)}")
        self.empty.remove(key)
        if contents:
            data.view(torch.uint8).numpy()[:] = np.frombuffer(contents, np.uint8)


def _parse(value: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, elements) of ``("storage", type, key, location, elements[, None])``."""
    if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
        raise Refusal("has a persistent id that is no storage")
    _, kind, key, _, count, *view = value
    name = kind.name if type(kind) is Reference and kind.module.startswith("torch") else ""
    if name not in STORAGES or type(key) is not str or type(count) is not int or count < 0:
        raise Refusal("has a persistent id that is no storage")
    if view not in ([], [None]):
        raise Refusal("has a storage that is a part of another one")
    return STORAGES[name], key, count


def _read_pickles(file: IO[bytes], size: int, nested: bool = False) -> Any:
    """A bare pickle, or PyTorch's older format: five pickles, then the storages."""
    constructors = CONSTRUCTORS if nested else {**CONSTRUCTORS, NESTED: _read_nested}
    storages = Storages(size)

    def run() -> Any:
        return Machine(constructors, storages.declare, REPEATS * size).run(file)

    content = run()
    if type(content) is int and content == MAGIC:
        protocol, system = run(), run()
        little = type(system) is dict and system.get("little_endian") is True
        if protocol != PROTOCOL or not little:
            raise ValueError("it is in another version or byte order of PyTorch's older format")
        content = run()
        for key in run():
            (count,) = struct.unpack("<q", file.read(8))
            data = storages.known[key].data
            if count != data.numel():
                raise ValueError(f"a storage of {data.numel()} elements has {count}")
            storages.fill(key, file.read(data.nbytes))
    if storages.empty:
        raise EOFError(f"{len(storages.empty)} of its storages have no contents")
    if file.read(1):
        raise ValueError("it goes on after its end")
    return content


def _read_nested(data: Any) -> Any:
    """A storage that was pickled by itself, as bytes in PyTorch's older format."""
    if type(data) is not bytes:
        raise Refusal("holds a storage that is not bytes")
    storage = _read_pickles(BytesIO(data), len(data), nested=True)
    if type(storage) is not Storage:
        raise Refusal(f"holds a {type(storage).__name__} where a storage belongs")
    return storage


def _read_zip(archive: ZipFile, root: str, size: int) -> Any:
    """PyTorch's present format: ``<root>data.pkl`` and ``<root>data/<key>``, not compressed."""
    names = set(archive.namelist())
    if f"{root}constants.pkl" in names:
        raise ValueError("it is a TorchScript program")
    if f"{root}byteorder" in names and _stored(archive, f"{root}byteorder", 16) != b"little":
        raise ValueError("it is in big-endian order")

    def fetch(key: str, nbytes: int) -> bytes:
        return _stored(archive, f"{root}data/{key}", nbytes)

    machine = Machine(
        {**CONSTRUCTORS, NESTED: _read_nested}, Storages(size, fetch).declare, REPEATS * size
    )
    return machine.run(BytesIO(_stored(archive, f"{root}data.pkl", size)))


def _stored(archive: ZipFile, name: str, most: int) -> bytes:
    """A member that is not compressed, of at most so many bytes; its check sum is checked."""
    info = archive.getinfo(name)
    if info.compress_type != ZIP_STORED:
        raise ValueError(f"{shown(name)} is compressed")
    if info.file_size > most:
        raise ValueError(f"{shown(name)} has {info.file_size} bytes, more than {most}")
    return archive.read(info)


def _read_member(archive: ZipFile, member: str | None) -> Any:
    """One checkpoint out of an archive of files, by way of a temporary file."""
    found = [i for i in archive.infolist() if Path(i.filename).suffix in SUFFIXES]
    if member is not None:
        found = [i for i in found if member in (i.filename, Path(i.filename).name)]
    if len(found) != 1:
        names = ", ".join(shown(name) for name in archive.namelist()[:8]) or "nothing"
        raise ValueError(f"not one {member or 'checkpoint'} but {len(found)} among {names}")
    info = found[0]
    if info.file_size > RATIO * info.compress_size:
        raise ValueError(
            f"{shown(info.filename)} would unpack from {info.compress_size} to {info.file_size} "
            "bytes"
        )
    with tempfile.TemporaryFile() as file, archive.open(info) as source:
        copyfileobj(source, file, 1 << 20)
        file.seek(0)
        return _read_open(file, inside=True)
