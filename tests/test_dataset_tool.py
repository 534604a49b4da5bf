"""What the tool makes of images: geometry, layout, equal bytes; whole or absent; in what memory."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from denoisers.training.batches import training_batch
from image_data.labelled import LabelledImages
from image_data.raw.dataset import RawDataset, RawImage
from image_data.raw.files import open_files
from image_data.sources import ImageSource, image_batches
from image_data.writer import SquareShape, destination, encode, name_of, write_dataset
from runtime.errors import UserError
from tests.processes import finish, start
from tools.dataset_tool import main

RNG = np.random.default_rng


def tool(source: Path, dest: Path, *options: str) -> Path:
    main.main(["--source", str(source), "--dest", str(dest), *options], standalone_mode=False)
    return dest


def png(seed: int, width: int = 8, height: int = 8) -> bytes:
    return encode(RNG(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, 0 * x], -1))


@pytest.mark.parametrize("width", range(5, 12))
@pytest.mark.parametrize("height", [7, 8])
def test_the_crop_is_the_middle(width: int, height: int) -> None:
    """Columns (w - s) // 2 ... as in EDM's tool: of an odd number, one more is cut on the right."""
    side = min(width, height)
    pixels = SquareShape(crop=True)(ramp(width, height))
    left, top = (width - side) // 2, (height - side) // 2
    y, x = np.mgrid[top : top + side, left : left + side]
    assert np.array_equal(pixels, np.stack([x, y, 0 * x], -1))


def test_resampling_keeps_the_place_of_the_crop() -> None:
    """A symmetric kernel reproduces a ramp: output j sees column left + 3 j + 1 at factor 3."""
    pixels = SquareShape(24, crop=True)(ramp(101, 72))
    inner = np.arange(3, 21)  # a Lanczos window is 3 pixels of the output wide on each side
    y, x = np.meshgrid(3 * inner + 1, (101 - 72) // 2 + 3 * inner + 1, indexing="ij")
    assert np.array_equal(pixels[3:21, 3:21], np.stack([x, y, 0 * x], -1))


@pytest.mark.parametrize("side", [16, 24, 36, 48, 96])
def test_resampling_is_by_lanczos(side: int) -> None:
    """A bright line becomes the kernel sinc(t) sinc(t/3), stretched where the image shrinks."""
    columns = np.full(48, 100.0)
    columns[20] = 220.0
    image = Image.fromarray(np.tile(columns[None, :, None], (48, 1, 3)).astype(np.uint8))
    factor = 48 / side
    t = (np.arange(48)[None] + 0.5 - (np.arange(side)[:, None] + 0.5) * factor) / max(factor, 1)
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
    known = weights @ columns / weights.sum(1)
    assert np.abs(SquareShape(side)(image) - known[None, :, None]).max() <= 1


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", {"a.png": png(0), "b.png": png(1, 9, 9), "c.png": png(2, 8, 10)})
    with pytest.raises(UserError, match="b.png in .* is 9x9, the images before it are"):
        tool(source, tmp_path / "out.zip")
    with pytest.raises(UserError, match="c.png in .* is 8x10, expected square: add"):
        tool(source, tmp_path / "out.zip", "--resolution", "8")
    with ImageSource(
        tool(source, tmp_path / "out.zip", "--resolution", "8x8", "--transform", "center-crop")
    ) as made:
        assert [made.read(i).shape for i in range(3)] == [(3, 8, 8)] * 3


def test_enlarging_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.png": png(0, 12, 12), "b.png": png(1, 40, 11), "c.png": png(2, 13, 9)}
    source = fill(tmp_path / "in", files)
    tool(source, tmp_path / "out.zip", "--resolution", "12", "--transform", "center-crop")
    assert "enlarged to 12x12: 2, first b.png in" in capsys.readouterr().out
    tool(source, tmp_path / "less.zip", "--resolution", "9", "--transform", "center-crop")
    assert "enlarged" not in capsys.readouterr().out


def test_what_the_readers_of_the_project_find(tmp_path: Path) -> None:
    """More than a thousand images, so that there are two folders in it."""
    image = RNG(0).integers(0, 256, (1003, 2, 2, 3), dtype=np.uint8)
    files = {f"{i % 3}/{i:04}.png": encode(image[i]) for i in range(1003)}
    order = sorted(range(1003), key=lambda i: (i % 3, i))
    made = tool(fill(tmp_path / "in", files), tmp_path / "out.zip")
    assert name_of(1002) == "00001/img00001002.png" and name_of(123456) == "00123/img00123456.png"
    found = np.concatenate(list(image_batches(made, 500)))
    assert np.array_equal(found, image[order].transpose(0, 3, 1, 2))
    data, some = LabelledImages(made, 3, 2, 3), [0, 999, 1000, 1002]
    batch = training_batch(data, some, some, "test")
    assert np.array_equal(batch.images, found[some])
    assert data.classes.tolist() == [i % 3 for i in order]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_images_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At another time, of files written in another order; and again of the result."""
    files = {f"{c}/{i}.png": png(i, 12, 10) for i in range(4) for c in "ab"}
    options = ("--resolution", "8", "--transform", "center-crop")
    first = tool(fill(tmp_path / "x", files), tmp_path / "1.zip", *options)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    other = fill(tmp_path / "y", dict(reversed(files.items())))
    second = tool(other, tmp_path / "2.zip", *options)
    again = tool(first, tmp_path / "3.zip")
    folder = tool(other, tmp_path / "4", *options)
    assert sha256(first) == sha256(second) == sha256(again)
    with zipfile.ZipFile(first) as archive:
        entries = archive.infolist()
        for entry in entries:
            assert (entry.compress_type, entry.date_time) == (0, (1980, 1, 1, 0, 0, 0))
            assert (folder / entry.filename).read_bytes() == archive.read(entry)
    assert [e.filename for e in entries[:2]] == ["00000/img00000000.png", "00000/img00000001.png"]
    assert entries[-1].filename == "dataset.json" and len(entries) == 9
    assert len(encode(np.zeros((64, 64, 3), np.uint8))) > 64 * 64 * 3  # PNGs are not compressed


BROKEN = {
    "cut short": png(0, 64, 64)[:5000],
    "empty": b"",
    "web page": b"<html>404</html>",
    "none of the formats": b"P6 8 8 255 " + bytes(192),  # Pillow might start a program for some
    "wrong header": png(0)[:20] + b"xxxx" + png(0)[24:],
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, packed: bool
) -> None:
    files = {"x/0.png": png(1), "x/1.png": BROKEN[case], "y/2.png": png(2), "y/3.png": png(3)}
    source = fill(tmp_path / "in", files)
    if packed:
        source = tmp_path / "in.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    before = set(tmp_path.rglob("*"))
    for dest in ("out", "out.zip"):
        with pytest.raises(UserError, match=f"^x/1.png in {source} cannot be read"):
            tool(source, tmp_path / dest)
    assert set(tmp_path.rglob("*")) == before
    made = tool(source, tmp_path / "out.zip", "--skip-broken")
    said = capsys.readouterr().out
    assert (
        f"skipped x/1.png in {source}: " in said
        and "skipped because they cannot be read: 1\n" in said
    )
    with ImageSource(made) as out:
        assert out.labels().tolist() == [0, 1, 1]
        for i in range(3):
            known = np.asarray(Image.open(io.BytesIO(png(i + 1)))).transpose(2, 0, 1)
            assert np.array_equal(out.read(i), known)


def test_a_damaged_member_of_a_zip_is_a_broken_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("b.png", png(1))
    data = bytearray((tmp_path / "in.zip").read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1  # Pillow would not notice; the zip's check sum does
    (tmp_path / "in.zip").write_bytes(data)
    with pytest.raises(UserError, match="^a.png in .* cannot be read .*CRC"):
        tool(tmp_path / "in.zip", tmp_path / "out.zip")
    with ImageSource(tool(tmp_path / "in.zip", tmp_path / "out.zip", "--skip-broken")) as made:
        assert len(made) == 1


def test_max_images_counts_those_that_are_written(tmp_path: Path) -> None:
    files = {"0.png": png(0), "1.png": b"", "2.png": png(2), "3.png": png(3), "4.png": b""}
    source = fill(tmp_path / "in", files)
    for most, count in ((1, 1), (2, 2), (3, 3), (9, 3)):
        made = tool(source, tmp_path / f"{most}.zip", "--skip-broken", "--max-images", str(most))
        with ImageSource(made) as out:
            assert len(out) == count
    tool(source, tmp_path / "first.zip", "--max-images", "1")  # does not look at the broken one
    with pytest.raises(UserError, match="none of the images in .* can be read"):
        tool(fill(tmp_path / "bad", {"1.png": b""}), tmp_path / "out.zip", "--skip-broken")
    assert not (tmp_path / "out.zip").exists()


class Interruption(Exception):
    pass


def numbers(count: int, end: Any = None) -> Iterator[RawImage]:
    """``count`` images; then ``end`` happens."""
    for i in range(count):
        image = Image.fromarray(RNG(i).integers(0, 256, (128, 128, 3), dtype=np.uint8))
        yield RawImage(str(i), i % 10, lambda image=image: image)
    if end is not None:
        end()


def write_all(dest: Path, items: Iterator[RawImage]) -> None:
    with destination(dest) as write:
        write_dataset(RawDataset(Path("numbers"), 9, "", items), write, SquareShape(), None, False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and signals")
@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_a_kill_leaves_no_destination(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, dest: str
) -> None:
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    log = tmp_path_factory.mktemp("log") / "child"
    child = start(lambda: write_all(tmp_path / dest, numbers(3, kill)), log)
    assert finish(child, log).code == -signal.SIGKILL
    assert not (tmp_path / dest).exists()
    assert all(p.name.startswith(".") for p in tmp_path.iterdir())  # nobody takes it for a result
    with pytest.raises(UserError, match="holds no image"), open_files(tmp_path):
        pass
    write_all(tmp_path / dest, numbers(3))
    with ImageSource(tmp_path / dest) as made:
        assert made.labels().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_an_interruption_leaves_nothing(tmp_path: Path, dest: str) -> None:
    def interrupt() -> None:
        raise Interruption

    with pytest.raises(Interruption):
        write_all(tmp_path / dest, numbers(3, interrupt))
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """An image here has 49,152 bytes; what is kept of one is its name and its class."""
    write_all(tmp_path / "first.zip", numbers(2))
    peaks = []
    for count in (4, 64):
        tracemalloc.start()
        write_all(tmp_path / f"{count}.zip", numbers(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 60 * 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--source": "nowhere"}, "nowhere does not exist: check --source"),
        ({"--source": "empty"}, "empty holds no image: expected files that end in .bmp, .gif"),
        (
            {"--source": "text"},
            "text is not a supported source: --source takes a folder, a zip, cifar-10",
        ),
        ({"--source": "cut.zip"}, "cut.zip cannot be read .*: fetch it again"),
        ({"--source": "cut.gz"}, "cut.gz cannot be read .*: fetch it again"),
        ({"--source": "other.tar"}, "other.tar holds no cifar-10-batches-py/data_batch_1: of tar"),
        ({"--dest": "full"}, "full exists already: remove it, or give another --dest"),
        ({"--dest": "text"}, "text exists already: remove it, or give another --dest"),
        ({"--split": "test"}, "in has no splits, only the CIFAR-10 tarball has them: omit --split"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, {"in/0.png": png(0), "text": b"text", "full/x": b"", "empty/a.txt": b""})
    fill(tmp_path, {"cut.zip": b"PK\3\4" + bytes(50), "cut.gz": b"\x1f\x8b\x08" + bytes(9)})
    with tarfile.open("other.tar", "w") as archive:
        archive.add("in")
    before = sorted(tmp_path.rglob("*"))
    given = {"--source": "in", "--dest": "out.zip"} | options
    with pytest.raises(UserError, match=f"^{message}") as caught:
        main.main([word for pair in given.items() for word in pair], standalone_mode=False)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["64x32", "0", "-1", "x", "64x", "6.4", "064"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{text}' is not a square size up to"):
        tool(Path("in"), Path("out.zip"), f"--resolution={text}")
