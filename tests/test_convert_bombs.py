"""Small files that ask for more than there is: each ends in one sentence, at once."""

from __future__ import annotations

import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.pickles import machine
from checkpoints.pickles.files import read
from checkpoints.snapshots import read_edm, read_predictor, read_weights
from tests.test_convert_hostile import (
    archive,
    bare,
    called,
    glob,
    legacy,
    put,
    refusal,
)  # fmt: skip


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor in a storage of four float32."""
    identity = b"(" + put("storage") + glob("torch", "FloatStorage") + put("0") + put("cpu")
    rebuilt = identity + put(4) + b"tQ" + put(offset) + put(size) + put(stride) + put(False) + b"}"
    return glob("torch._utils", "_rebuild_tensor_v2") + b"(" + rebuilt + b"tR"


def with_storage(payload: bytes) -> bytes:
    """PyTorch's older format with one storage of four float32."""
    keys = pickle.dumps(["0"], 2)
    return legacy(payload)[: -len(pickle.dumps([], 2))] + keys + struct.pack("<q4f", 4, *range(4))


def test_tensors_inside_their_storage(tmp_path: Path) -> None:
    """The cases that the ones below step out of."""
    path = tmp_path / "x.pt"
    for size, stride, offset, expected in (
        ((2, 2), (1, 2), 0, [[0, 2], [1, 3]]),
        ((2,), (2,), 1, [1, 3]),
        ((), (), 3, 3),
        ((2, 0), (5, 1), 0, [[], []]),
    ):
        path.write_bytes(with_storage(tensor(size, stride, offset)))
        assert read(path).tolist() == expected


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0), ((2,), (4,), 0), ((2,), (1,), 3), ((4,), (1,), 1), ((1,), (1,), 4),
        ((-1,), (1,), 0), ((2,), (-1,), 1), ((2,), (1,), -1), ((2, 2), (1,), 0),
        ((2**40,), (0,), 0), ((5,), (0,), 0), ((2**62, 2**62), (0, 0), 0), ((2**70,), (1,), 0),
        ((2,), (2**62,), 0), ((2,), (2**70,), 0), ((1.5,), (1,), 0), (("2",), (1,), 0),
        ((1,) * 1000, (1,) * 1000, 0), ((True,), (1,), 0),
    ],
)  # fmt: skip
def test_tensors_beyond_their_storage(size: Any, stride: Any, offset: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(with_storage(tensor(size, stride, offset)))
    assert "holds a tensor" in refusal(path)


def persistent(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    parts = put("storage") + glob("torch", kind) + put(key) + put("cpu") + put(count)
    return b"(" + parts + b"tQ"


def doubled(steps: int, last: bytes = b"") -> bytes:
    """A tuple that holds the one before twice, and so on: small here, 2**steps leaves unfolded."""
    return put(0) + b"".join(b"2\x86" for _ in range(steps)) + last


def long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def again(function: bytes, *args: bytes, times: int = 3000) -> bytes:
    """A call made and dropped many times over, of values that were put aside before."""
    return times * (called(function, *args) + b"0")


FLOATS = persistent(4)
NESTED = glob("torch.storage", "_load_from_bytes")
BIG = put("x" * 10**5) + b"q\x090"
MANY = b"}(" + b"".join(put(str(i)) + b"N" for i in range(10**4)) + b"u"
META = b"}(" + put("type") + put("class") + put("class_name") + put("X") + put("state") + MANY
ARRAY = called(glob("numpy", "dtype"), put("u1")) + b"q\x080"
ARRAY += called(glob("numpy.core.multiarray", "_reconstruct"), glob("numpy", "ndarray"), b")")
#: Multiples of this have the hash 0, so that each is compared with all others.
SAME = [long(i * (2**61 - 1)) for i in range(2, 20000)]
#: Small files that ask for endless work or memory.
BOMBS: dict[str, bytes] = {
    "storage of 4 EB": persistent(2**60),
    "storage of 40 GB": persistent(10**10),
    "negative storage": persistent(-1),
    "storages beyond the file": b"(" + b"".join(persistent(50, key=k) for k in "abcdefghi") + b"t",
    "storage in two types": b"(" + persistent(1) + persistent(1, "IntStorage") + b"t",
    "text of 4 EB": b"\x8d" + struct.pack("<Q", 2**62),
    "bytes of 16 EB": b"\x8e" + struct.pack("<Q", 2**64 - 1),
    "bytes of 4 GB": b"B" + struct.pack("<I", 2**32 - 1) + b"x",
    "number of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x7f",
    "number of a million bits": b"\x8b" + struct.pack("<i", 10**5) + b"\x7f" * 10**5,
    "number of a million digits": b"I" + b"9" * 10**6 + b"\n",
    "key that takes years to hash": b"}" + doubled(70) + b"Ns",
    "element that takes years to hash": b"\x8f(" + doubled(70) + b"\x90",
    "key as deep as the file": b"})" + b"\x85" * 50000 + b"Ns",
    "keys of one hash": b"}(" + b"N".join(SAME) + b"Nu",
    "keys of one hash, in pairs": b"}(" + b"N".join(n + b"\x85" for n in SAME) + b"Nu",
    "the same text encoded again and again": BIG
    + again(glob("_codecs", "encode"), b"h\x09", put("latin1")),
    "the same pairs again and again": put([[i, i] for i in range(3000)]) + b"q\x090"
    + again(glob("collections", "OrderedDict"), b"h\x09", times=9000),
    "the same element again and again": b"](" + b"N" * 10**5 + b"eq\x090"
    + again(glob("builtins", "set"), b"h\x09"),
    "the same attributes again and again": META + b"uq\x090"
    + again(glob("torch_utils.persistence", "_reconstruct_persistent_obj"), b"h\x09", times=20000),
    "the same array again and again": BIG + ARRAY
    + 20000 * (b"](K\x01" + put((10**5,)) + b"h\x08Nh\x09eb"),
    "the same storage again and again": put(with_storage(persistent(4))) + b"q\x090"
    + again(NESTED, b"h\x09", times=900),
    "a storage in a storage": called(NESTED, put(bare(called(NESTED, put(with_storage(FLOATS)))))),
    "text of a device": called(glob("torch", "device"), doubled(70)),
    "a deep name": put("os") + doubled(70) + b"\x93",
}  # fmt: skip


def peak() -> float:
    """Memory that this process has had at most, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_fizzle(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(with_storage(BOMBS[name]))
    began, before = time.process_time(), peak()
    refusal(path)
    archive(BOMBS[name], path)
    refusal(path)
    assert time.process_time() - began < 3 and peak() - before < 100


def test_nested_storages_share_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage is a pickle of its own; it is asked for again and again."""
    monkeypatch.setattr(machine, "MOST_INSTRUCTIONS", 200_000)
    path = tmp_path / "x.pt"
    data = with_storage(b"]0" * 30_000 + FLOATS)
    path.write_bytes(bare(put(data) + b"q\x090" + again(NESTED, b"h\x09", times=64) + b"N"))
    began = time.process_time()
    assert "has more than 200000 instructions" in refusal(path)
    assert time.process_time() - began < 3


def test_a_place_far_away_takes_no_memory(tmp_path: Path) -> None:
    """Python's unpickler has a table of all places up to the last, of 32 GB here."""
    path = tmp_path / "x.pkl"
    path.write_bytes(bare(b"K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff"))
    before = peak()
    assert read(path) == 5 and peak() - before < 100


def one_module(times: int, leaf: bytes) -> bytes:
    """A module that holds one other several times, which holds ..., down to ``leaf``."""
    for _ in range(6):
        names = b"".join(put(f"m{i}") + b"h\x01" for i in range(times))
        leaf += b"q\x010" + MODULE + b"}" + put("_modules") + b"}(" + names + b"usb"
    return leaf


MODULE = glob("torch.nn.modules.container", "Sequential") + b")\x81"
INNER = b"}" + put("_modules") + b"}" + put("m")
#: Data that means nothing, but that a walk without a limit would not survive.
DEEP: dict[str, bytes] = {
    "lists": b"]" * 50000 + b"a" * 49999,
    "modules": (MODULE + INNER) * 3000 + MODULE + b"ssb" * 3000,
    "a few modules too many": (MODULE + INNER) * 40 + MODULE + b"ssb" * 40,
    "tuples": doubled(3000),
    "a module at 100,000 places": one_module(7, MODULE + b"}" + put("_parameters") + MANY + b"sb"),
    "a long name before 10,000 others": MODULE + b"q\x010" + MODULE + b"}" + put("_modules") + b"}"
    + put("x" * 10**6) + MODULE + b"}" + put("_modules") + MANY.replace(b"N", b"h\x01") + b"sbssb",
    "a dict in itself": b"}q\x01" + put("ema") + b"h\x01s",
    "a module in itself": MODULE + b"q\x01" + INNER + b"h\x01ssb",
}  # fmt: skip


def test_storages_need_their_contents(tmp_path: Path) -> None:
    """No memory is taken for more than the file can hold, and none is left as it was found."""
    path = tmp_path / "x.pt"
    path.write_bytes(legacy(FLOATS))
    assert "its storages have no contents" in refusal(path)
    for name in ("storage of 4 EB", "storage of 40 GB", "storages beyond the file"):
        path.write_bytes(with_storage(BOMBS[name]))
        assert "its storages are larger than the file" in refusal(path)
    path.write_bytes(with_storage(BOMBS["storage in two types"]))
    assert "declares the storage '0' in two ways" in refusal(path)
    path.write_bytes(with_storage(BOMBS["a storage in a storage"]))
    assert "calls 'torch.storage._load_from_bytes'" in refusal(path)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("reader", [read_edm, read_predictor, read_weights])
def test_depth_is_no_danger(name: str, reader: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(bare(b"}" + put("model") + DEEP[name] + b"s"))
    began, before = time.process_time(), peak()
    refusal(path, reader)
    assert time.process_time() - began < 3 and peak() - before < 100


def test_what_holds_itself_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(bare(DEEP["a dict in itself"]))
    content = read(path)
    assert content["ema"] is content


def test_archives_that_unpack_to_too_much(tmp_path: Path) -> None:
    path = tmp_path / "models.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("model.ckpt", bytes(10**8))
    assert "model.ckpt would unpack from" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bare(b"N"))
    assert "data.pkl is compressed" in refusal(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + 24  # the size in the directory: 4 GB in a file of 1 kB
    data[place : place + 4] = b"\xf0\xff\xff\xff"
    path.write_bytes(data)
    refusal(path)
    inner = tmp_path / "inner.pt"
    torch.save({"a": torch.zeros(2)}, inner)
    nested = tmp_path / "nested.pt"
    with zipfile.ZipFile(nested, "w") as made:
        made.write(inner, "model.pt")
    with zipfile.ZipFile(path, "w") as made:
        made.write(nested, "model.pt")
    assert read(nested)["a"].tolist() == [0, 0]
    assert "it is an archive in an archive" in refusal(path)
