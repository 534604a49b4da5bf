"""NumPy's files of others: only what is asked for is read, and no more than the file can mean."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import arrays
from checkpoints.arrays import read_npy, read_npz
from metrics.statistics import DetectorId, Statistics
from metrics.summary import FeatureSummary
from pds.masks import load_mask
from runtime.errors import UserError
from tests.attacks import attack_bytes
from tests.test_convert_bombs import peak
from tests.toy_detector import images, toy

SOME = {
    "a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.arange(6).reshape(3, 2)),
    "c": np.array("text"), "d": np.array(3), "e": np.zeros((0, 4), np.uint8), "f": np.array(""),
}  # fmt: skip


def saved(path: Path, **more: Any) -> Path:
    np.savez_compressed(path, **{**SOME, **more})
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_reads_them(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **SOME)
    found = read_npz(tmp_path / "x.npz")
    assert list(found) == list(SOME)
    for name, value in SOME.items():
        np.save(tmp_path / "x.npy", value)
        for one in (found[name], read_npy(tmp_path / "x.npy")):
            assert one.dtype == value.dtype and one.flags.writeable
            np.testing.assert_array_equal(one, value)


def test_what_is_not_asked_for_is_left_alone(tmp_path: Path) -> None:
    """100 MB of zeros in half a MB, and pickled objects: neither is looked at."""
    path, objects = tmp_path / "x.npz", np.array([{}, 1], dtype=object)
    saved(path, more=objects)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("big.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(100):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 2 << 20
    before, began = peak(), time.process_time()
    assert list(read_npz(path, ("a", "nothing"))) == ["a"]
    for names in (None, ("big",)):
        with pytest.raises(ValueError, match="unpack to far more than it holds"):
            read_npz(path, names)
    with pytest.raises(ValueError, match="holds object instead of numbers or text"):
        read_npz(path, ("more",))
    assert peak() - before < 50 and time.process_time() - began < 1


def npy(shape: str, kind: str = "<f8", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (npy("(1000000000000,)"), "its size is not that of an array of the shape"),
        (npy("(3,)", data=bytes(23)), "its size is not that"),
        (npy("(3,)", data=bytes(25)), "its size is not that"),
        (npy("(-3, -1)", data=bytes(24)), "its size is not that"),
        (npy("(1,)", "|O", bytes(8)), "holds object instead of numbers or text"),
        (npy("(1,)", "<M8[s]", bytes(8)), "instead of numbers or text"),
        (npy("(1" + ",1" * 20_000 + ")"), "."),
        (b"\x93NUMPY\x09\x00" + bytes(99), "unknown version"),
        (b"", "."),
    ],
    ids=range(9),
)
def test_files_that_are_no_arrays_are_refused(data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    before = peak()
    with pytest.raises(ValueError, match=sentence):
        read_npy(tmp_path / "x.npy")
    with pytest.raises(UserError, match="cannot be read .*: fit one with"):
        load_mask("freq", str(tmp_path / "x.npy"), "tiny", (3, 8, 8))
    assert peak() - before < 50


def encrypted(path: Path) -> None:
    """The flag of encryption in every header."""
    data = path.read_bytes()
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            data = data[: at + place] + b"\x01" + data[at + place + 1 :]
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def packed_by_lzma(path: Path) -> None:
    content = {}
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("pack", [encrypted, packed_by_lzma])
def test_archives_packed_in_another_way_are_refused(
    pack: Callable[[Path], None], tmp_path: Path
) -> None:
    path = saved(tmp_path / "x.npz", mu=np.zeros(3))
    pack(path)
    with pytest.raises(ValueError, match="'a' is encrypted or packed in an unknown way"):
        read_npz(path)
    with pytest.raises(ValueError, match="x.npz is not an .npz of plain arrays"):
        Statistics.load(path)


def test_statistics_survive_every_damage(tmp_path: Path) -> None:
    path, detector = tmp_path / "x.npz", toy()
    statistics = Statistics(DetectorId("toy", "ab" * 32, 6))
    statistics.update(detector(images(20)))
    FeatureSummary(statistics, None, detector(images(20))).save(path)

    def use() -> None:
        try:
            FeatureSummary.load(path, detector)
        except ValueError as error:
            raise UserError(str(error)) from None

    attack_bytes(path, use, 150)
    with np.load(path) as content:
        good = dict(content)
    for name in good:
        for wrong in (np.zeros(0), np.array("x"), np.array(-1.5), np.full((2, 2), np.nan)):
            np.savez(path, **{**good, name: wrong})
            try:
                FeatureSummary.load(path, detector)
            except ValueError as error:
                assert "\n" not in str(error)


def test_the_bound_of_an_archive_grows_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arrays, "LEAST", 0)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.tile(np.random.default_rng(0).bytes(100_000), 1))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    assert list(read_npz(tmp_path / "x.npz")) == ["a"]
