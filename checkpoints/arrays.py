"""NumPy's files, read as data: no pickled object, and no more memory than a file can mean."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy

from checkpoints.pickles.records import shown

Array = np.ndarray[Any, Any]
KINDS = "biufcSU"  #: numbers and text
#: What an archive may unpack to: that much, or some times its own size, as statistics shrink by
#: a tenth and empty rows to nothing.
LEAST, RATIO = 64 << 20, 20
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(path: Path) -> Array:
    """The array of a ``.npy``.

    Raises OSError for a file that cannot be opened, and ValueError for one that is damaged.
    """
    with open(path, "rb") as file:
        return _array(file, path.stat().st_size)


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """The arrays of an ``.npz``; those outside ``names``, if given, are left alone.

    Raises OSError for a file that cannot be opened, and ValueError for one that is damaged, or
    would unpack to far more than it is.
    """
    size = path.stat().st_size
    try:
        with ZipFile(path) as archive:
            found = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            wanted = {n: i for n, i in found.items() if names is None or n in names}
            for name, info in wanted.items():
                if info.flag_bits & 1 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
                    raise ValueError(f"'{shown(name)}' is encrypted or packed in an unknown way")
            if sum(info.file_size for info in wanted.values()) > max(LEAST, RATIO * size):
                raise ValueError("it would unpack to far more than it holds")
            arrays = {}
            for name, info in wanted.items():
                with archive.open(info) as file:
                    arrays[name] = _array(file, info.file_size)
            return arrays
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ValueError(str(error) or "it is cut short") from None


def require_like(arrays: Mapping[str, Array], like: Mapping[str, Array]) -> None:
    """Raise ValueError unless the arrays are as in ``like``, in shape and type, and finite."""
    for name, own in like.items():
        given = arrays.get(name)
        if given is None or (given.shape, given.dtype) != (own.shape, own.dtype):
            raise ValueError(f"'{name}' is missing or of another shape or type")
        if not np.isfinite(given).all():
            raise ValueError(f"'{name}' holds numbers that are not finite")


def _array(file: IO[bytes], size: int) -> Array:
    """The array in a file of ``size`` bytes; it is read only if it fills the file."""
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"it is in the unknown version {version} of NumPy's format")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype.hasobject or dtype.kind not in KINDS:
        raise ValueError(f"it holds {shown(dtype)} instead of numbers or text")
    need = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file.tell() + need != size:
        raise ValueError(f"its size is not that of an array of the shape {shown(shape)}")
    data = bytearray(need)
    if file.readinto(data) != need:  # type: ignore[attr-defined]
        raise ValueError("it is cut short")
    if not need:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
