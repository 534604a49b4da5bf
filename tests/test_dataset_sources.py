"""Every kind of source and of image: pixels, classes, and one sentence for what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from image_data.formats import decode
from image_data.sources import ImageSource
from runtime.errors import UserError
from tests.deep_images import png16
from tools.dataset_tool import main

RNG = np.random.default_rng
BATCHES = [*(f"data_batch_{i}" for i in (1, 2, 3, 4, 5)), "test_batch"]


def tool(source: Path, dest: Path, *options: str) -> Path:
    main.main(["--source", str(source), "--dest", str(dest), *options], standalone_mode=False)
    return dest


def pixels_of(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return RNG(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(path: Path, files: dict[str, bytes]) -> Path:
    """The files in a folder, or in a zip if the path says so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def contents(path: Path) -> np.ndarray:
    """(N, H, W, 3) as the project's reader has them, in order."""
    with ImageSource(path) as source:
        assert source.names == [f"{i // 1000:05}/img{i:08}.png" for i in range(len(source))]
        return np.stack([source.read(i).transpose(1, 2, 0) for i in range(len(source))])


def labels(path: Path) -> list[int]:
    with ImageSource(path) as source:
        return source.labels().tolist()


def python2(value: Any) -> bytes:
    """The instructions by which Python 2 pickles a value in protocol 2: text is bytes to it."""
    if isinstance(value, str | bytes):
        value = value.encode() if isinstance(value, str) else value
        short = len(value) < 256
        return (
            b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))
        ) + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    size = b"".join(map(python2, value.shape))
    order, data = (b"\x88", value.tobytes("F")) if value.flags.fnc else (b"\x89", value.tobytes())
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + size + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + order + python2(data) + b"tb"
    )  # fmt: skip


def cifar(path: Path, each: int = 3, **replaced: bytes) -> tuple[np.ndarray, list[int]]:
    """A small tarball in the published form and order; its training images and classes."""
    images, classes, files = [], [], {}
    for number, name in enumerate(BATCHES):
        rows = RNG(number).integers(0, 256, (each, 3072), dtype=np.uint8)
        rows = np.asfortranarray(rows) if number == 1 else rows
        these = [(7 * number + i) % 10 for i in range(each)]
        batch = {"batch_label": f"batch {number}", "labels": these, "data": rows,
                 "filenames": [f"{i}.png" for i in range(each)]}  # fmt: skip
        name = f"cifar-10-batches-py/{name}"
        files[name] = b"\x80\x02" + python2(batch) + b"."
        known = pickle.loads(files[name], encoding="bytes")  # what Python itself makes of it
        assert np.array_equal(known[b"data"], rows) and known[b"labels"] == these
        if "data_batch" in name:
            images.append(rows.reshape(each, 3, 32, 32).transpose(0, 2, 3, 1))
            classes += these
    files |= {f"cifar-10-batches-py/{name}": content for name, content in replaced.items()}
    with tarfile.open(path, "w:gz") as archive:
        for name in sorted(files, reverse=True):  # the published order is none
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    return np.concatenate(images), classes


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_cifar10(tmp_path: Path, dest: str, capsys: pytest.CaptureFixture[str]) -> None:
    images, classes = cifar(tmp_path / "cifar-10-python.tar.gz")
    made = tool(tmp_path / "cifar-10-python.tar.gz", tmp_path / dest)
    assert np.array_equal(contents(made), images) and labels(made) == classes
    said = capsys.readouterr().out
    assert said == f"wrote {made}: 15 images of 32x32, 10 classes of CIFAR-10 (train)\n"


def test_cifar10_test_images(tmp_path: Path) -> None:
    cifar(tmp_path / "c.tar.gz", 4)
    made = tool(tmp_path / "c.tar.gz", tmp_path / "out.zip", "--split", "test")
    rows = RNG(5).integers(0, 256, (4, 3072), dtype=np.uint8)
    assert np.array_equal(contents(made), rows.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
    assert labels(made) == [5, 6, 7, 8]


HOSTILE = b"\x80\x02cos\nsystem\nU\x0ctouch marker\x85R."


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (HOSTILE, "asks for 'os.system'.*nothing in it was run"),
        (b"\x80\x02" + python2({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}) + b".",
         "holds no images of CIFAR-10: fetch it again"),
        (b"\x80\x02" + python2({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}) + b".",
         "holds no images of CIFAR-10: fetch it again"),
        (b"\x80\x02" + python2({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}) + b".",
         "holds no images of CIFAR-10: fetch it again"),
        (b"\x80\x02" + python2([1, 2]) + b".", "holds no images of CIFAR-10"),
        (b"\x80\x02}", "is damaged"),
    ],
)  # fmt: skip
def test_bad_batches_of_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path / "c.tar.gz", data_batch_3=replaced)
    path = f"cifar-10-batches-py/data_batch_3 in {tmp_path}/c.tar.gz"
    with pytest.raises(UserError, match=f"^{path} {message}"):
        tool(tmp_path / "c.tar.gz", tmp_path / "out.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["c.tar.gz"]


def idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    packed = path.suffix == ".gz"
    path.write_bytes(gzip.compress(head + array.tobytes()) if packed else head + array.tobytes())


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(tmp_path: Path, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    gray = RNG(0).integers(0, 256, (5, 9, 9), dtype=np.uint8)
    idx(tmp_path / f"train-images-idx3-ubyte{end}", gray)
    source = tmp_path / f"train-images-idx3-ubyte{end}"
    bare = tool(source, tmp_path / "bare.zip")
    assert "no classes (there is no file of labels beside the images)" in capsys.readouterr().out
    with zipfile.ZipFile(bare) as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([3, 1, 4, 1, 5], np.uint8))
    made = tool(source, tmp_path / "out.zip")
    assert np.array_equal(contents(made), np.repeat(gray[..., None], 3, -1))
    assert labels(made) == [3, 1, 4, 1, 5]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_bad_idx(tmp_path: Path, end: str) -> None:
    source, beside = tmp_path / f"a-images-idx3{end}", tmp_path / "a-labels-idx1"
    idx(source, np.zeros((4, 3, 3), np.uint8))
    idx(beside, np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="a-labels-idx1 does not hold the labels of"):
        tool(source, tmp_path / "out.zip")
    with pytest.raises(UserError, match="a-labels-idx1 is the labels of an idx data"):
        tool(beside, tmp_path / "out.zip")
    beside.unlink()
    whole = source.read_bytes()
    source.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=f"a-images-idx3{end} cannot be read .*: fetch"):
        tool(source, tmp_path / "out.zip")
    idx(source, np.zeros((1, 20_000, 1), np.uint8))
    with pytest.raises(UserError, match="says that its images are 1x20000: fetch it"):
        tool(source, tmp_path / "out.zip")
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_of_classes_and_a_zip_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ImageNet's: classes are the sorted top folders, whatever lies deeper or is a link."""
    at = {"n02/b.JPEG": 0, "n01/x/2.png": 1, "n01/x/1.bmp": 2, "n01/3.tiff": 3, "n10/a.webp": 4}
    kinds = {".JPEG": "PNG", ".png": "PNG", ".bmp": "BMP", ".tiff": "TIFF", ".webp": "WEBP"}
    images = {
        name: encoded(pixels_of(i), kinds[Path(name).suffix], lossless=True)
        for name, i in at.items()
    }
    extra = {".hidden/a.png": b"", "__MACOSX/._b.png": b"", "n01/list.txt": b"", ".DS_Store": b""}
    whole = fill(tmp_path / "whole.zip", images | extra)
    folder = fill(tmp_path / "folder", images | extra)
    (folder / "n02").rename(tmp_path / "elsewhere")
    (folder / "n02").symlink_to(tmp_path / "elsewhere")
    made = [tool(s, tmp_path / f"{s.stem}-out.zip") for s in (whole, folder)]
    said = capsys.readouterr().out
    assert "3 classes by sub-folder: 0 n01, 1 n02, 2 n10" in said
    assert "left out because they do not end in .bmp, .gif, " in said and ".webp: 1\n" in said
    order = ["n01/3.tiff", "n01/x/1.bmp", "n01/x/2.png", "n02/b.JPEG", "n10/a.webp"]
    assert np.array_equal(contents(made[0]), [pixels_of(at[name]) for name in order])
    assert labels(made[0]) == [0, 0, 0, 1, 2]
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize(
    ("names", "table", "expected", "words"),
    [
        (["b.png", "a.png"], None, None, "do not lie in several sub-folders"),
        (["x/b.png", "x/a.png"], None, None, "do not lie in several sub-folders"),
        (["x/b.png", "y/c.png", "a.png"], None, None, "do not lie in several sub-folders"),
        (["x/b.png", "y/a.png"], None, [0, 1], "2 classes by sub-folder: 0 x, 1 y"),
        (["x/b.png", "y/a.png"], b'{"labels": null}', None, "dataset.json has none"),
        (["x/b.png", "y/a.png"], b'{"labels": [["y/a.png", 1], ["x/b.png", 6]]}', [6, 1],
         "2 classes from dataset.json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["in", "in.zip"])
def test_where_classes_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], table: bytes | None,
    expected: list[int] | None, words: str, where: str,
) -> None:  # fmt: skip
    files = {name: encoded(pixels_of(0)) for name in names}
    if table is not None:
        files["dataset.json"] = table
    made = tool(fill(tmp_path / where, files), tmp_path / "out.zip")
    assert words in capsys.readouterr().out
    with zipfile.ZipFile(made) as archive:
        rows = json.loads(archive.read("dataset.json"))["labels"]
    assert rows == (expected and [[f"00000/img{i:08}.png", c] for i, c in enumerate(expected)])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"{", "has a dataset.json that is not"),
        (b"[]", "has a dataset.json that is not"),
        (b'{"labels": [["a.png"]]}', "has a dataset.json that is not"),
        (b'{"labels": [["b.png", 1]]}', r"a.png in .* has no class in dataset.json \(None\)"),
        (b'{"labels": [["a.png", -1]]}', r"a.png in .* has no class in dataset.json \(-1\)"),
        (b'{"labels": [["a.png", true]]}', r"a.png in .* has no class in dataset.json \(True\)"),
    ],
)
def test_bad_tables(tmp_path: Path, table: bytes, message: str) -> None:
    source = fill(tmp_path / "in", {"a.png": encoded(pixels_of(0)), "dataset.json": table})
    with pytest.raises(UserError, match=message):
        tool(source, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def as_array(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image is not None and image.mode == "RGB"
    return np.array(image).astype(int)


def test_gray_palette_and_cmyk_become_rgb() -> None:
    rgb = pixels_of(1)
    gray = rgb[..., 0]
    assert np.array_equal(as_array(encoded(gray)), np.repeat(gray[..., None], 3, -1))
    bits = Image.fromarray(gray > 127)
    assert np.array_equal(as_array(encoded(bits))[..., 1], 255 * (gray > 127))
    few = (rgb // 128 * 255).astype(np.uint8)  # 8 colours, which a palette can hold
    palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert palette.mode == "P" and np.array_equal(as_array(encoded(palette)), few)
    cmyk = RNG(2).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    known = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    found = as_array(encoded(Image.fromarray(cmyk, mode="CMYK"), "TIFF"))
    assert np.abs(found - known).max() <= 1


def test_alpha_is_over_white() -> None:
    rgba = RNG(3).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 255, 0
    found, alpha = as_array(encoded(rgba)), rgba[..., 3:] / 255
    assert np.abs(found - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert np.array_equal(found[0], rgba[0, :, :3]) and (found[1] == 255).all()
    rgb = pixels_of(4)
    rgb[2, 3] = 10, 20, 30
    keyed = as_array(encoded(rgb, transparency=(10, 20, 30)))  # one colour means "nothing here"
    rgb[2, 3] = 255
    assert np.array_equal(keyed, rgb)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gray.png", png16(1, 0)),
        ("gray-alpha.png", png16(2, 4)),
        ("rgb.png", png16(3, 2)),
        ("rgba.png", png16(4, 6)),
        ("a.tif", encoded(np.zeros((4, 4), np.uint16), "TIFF")),
        ("b.tif", encoded(np.zeros((4, 4), np.int32), "TIFF")),
        ("c.tif", encoded(np.zeros((4, 4), np.float32), "TIFF")),
    ],
)
def test_more_than_8_bits_are_refused_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    """Not skipped either: they are not broken."""
    source = fill(tmp_path / "in", {name: data})
    with pytest.raises(UserError, match=f"^{name} in .* has more than 8 bits per"):
        tool(source, tmp_path / "out.zip", "--skip-broken")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(kind: str) -> None:
    """Values of the EXIF tag 0x0112: what has to be done to the stored rows and columns."""
    turns = [
        lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud,
        lambda a: a.transpose(1, 0, 2), lambda a: np.rot90(a, -1),
        lambda a: np.rot90(a, 2).transpose(1, 0, 2), np.rot90,
    ]  # fmt: skip
    stored = pixels_of(5, 4, 6)
    for value, turn in enumerate(turns, start=1):
        exif = Image.Exif()
        exif[0x0112] = value
        found = as_array(encoded(stored, kind, exif=exif, lossless=True))
        assert np.array_equal(found, turn(stored)), value


def test_nothing_but_pixels_is_kept(tmp_path: Path) -> None:
    """A profile, a gamma or a transparent colour would change what readers see."""
    data = encoded(pixels_of(6), icc_profile=b"profile", dpi=(9, 9), transparency=(1, 2, 3))
    made = tool(fill(tmp_path / "in", {"a.png": data}), tmp_path / "out")
    png = (made / "00000/img00000000.png").read_bytes()
    assert all(chunk in data for chunk in (b"iCCP", b"pHYs", b"tRNS"))
    place, chunks = 8, []
    while place < len(png):
        (size,) = struct.unpack_from(">I", png, place)
        chunks.append(png[place + 4 : place + 8])
        place += 12 + size
    assert chunks == [b"IHDR", b"IDAT", b"IEND"]
