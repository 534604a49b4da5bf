"""Images from folders and zips, and one sentence for each thing that can be wrong with them."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_data.sources import ImageSource, count_images, image_batches
from metrics.draws import choose
from tests.deep_images import png16


def encoded(
    seed: int, size: tuple[int, int] = (8, 6), mode: str = "RGB", kind: str = "PNG"
) -> tuple[np.ndarray, bytes]:
    """Random pixels (H, W, 3), and the bytes of an image file made of them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return pixels, buffer.getvalue()


def fill(path: Path, files: dict[str, bytes]) -> Path:
    """Write the files to a folder, or to a zip if the path says so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.fixture(params=["images", "images.zip"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_all_images_sorted_whatever_the_format(target: Path) -> None:
    kinds = {"b/2.PNG": "PNG", "a.webp": "WEBP", "b/1.png": "PNG", "c.jpg": "JPEG"}
    made = {name: encoded(i, kind=kind) for i, (name, kind) in enumerate(kinds.items())}
    extra = {"dataset.json": b"{}", "__MACOSX/._a.png": b"junk", "notes.txt": b""}
    fill(target, {k: v[1] for k, v in made.items()} | extra)
    images = torch.cat(list(image_batches(target, 3)))
    assert images.shape == (4, 3, 6, 8) and images.dtype == torch.uint8
    for image, name in zip(images, ["a.webp", "b/1.png", "b/2.PNG"], strict=False):
        assert np.array_equal(image.permute(1, 2, 0), made[name][0]), name
    lossy = images[3].permute(1, 2, 0).numpy().astype(float)
    assert 0 < np.abs(lossy - made["c.jpg"][0]).mean() < 60


def test_ranks_share_the_images_of_a_draw(target: Path) -> None:
    fill(target, {f"{i:02}.png": encoded(i)[1] for i in range(11)})
    everything = torch.cat(list(image_batches(target, 4)))
    for size in (1, 2, 3):
        dealt = [torch.cat(list(image_batches(target, 2, (r, size)))) for r in range(size)]
        for rank, images in enumerate(dealt):
            assert torch.equal(images, everything[rank::size])
    some = torch.cat(list(image_batches(target, 4, num=6, seed=3)))
    halves = [torch.cat(list(image_batches(target, 4, (r, 2), 6, 3))) for r in range(2)]
    assert torch.equal(some[0::2], halves[0]) and torch.equal(some[1::2], halves[1])
    assert count_images(target) == 11 and count_images(target, 6) == 6


def test_a_draw_is_a_sorted_subset_fixed_by_its_seed() -> None:
    draws = [choose(100, 30, seed) for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    for draw in draws:
        assert len(set(draw)) == 30 and np.array_equal(draw, np.sort(draw)) and draw.max() < 100
    assert np.array_equal(choose(5, None, 0), np.arange(5))


def test_labels(target: Path) -> None:
    table = [["b/1.png", 7], ["a.png", 3]]
    files = {name: encoded(0)[1] for name, _ in table}
    good = json.dumps({"labels": table}).encode()
    with ImageSource(fill(target, files | {"dataset.json": good})) as s:
        assert s.labels().tolist() == [3, 7]
    for broken in (b"{", b'{"labels": null}', b'{"labels": [["a.png", 3]]}'):
        with (
            pytest.raises(ValueError, match="no label for each"),
            ImageSource(fill(target, files | {"dataset.json": broken})) as s,
        ):
            s.labels()


OK = {"0.png": encoded(0)[1], "1.png": encoded(1)[1]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b""}, "no image"),
        ({"0.png": encoded(0)[1]}, "1 image"),
        (OK | {"2.png": encoded(2, (9, 6))[1]}, "2.png .* 9x6, the first is 8x6"),
        (OK | {"2.png": encoded(2)[1][:90]}, "2.png .* cannot be read"),
        (OK | {"2.jpg": encoded(2, kind="JPEG")[1][:300]}, "2.jpg .* cannot be read"),
        (OK | {"2.png": b""}, "2.png .* cannot be read"),
        (OK | {"2.png": encoded(2, mode="L")[1]}, "2.png .* grayscale"),
        (OK | {"2.png": encoded(2, mode="RGBA")[1]}, "2.png .* mode RGBA"),
        (OK | {"2.png": encoded(2, mode="P")[1]}, "2.png .* mode P"),
        (OK | {"2.png": encoded(2, mode="I;16")[1]}, "2.png .* more than 8 bits"),
        (OK | {"2.png": png16(3, 2, 8)}, "more than 8 bits"),
        ({f"{i}.png": png16(3, 2) for i in range(2)}, "0.png .* more than 8"),
    ],
)
def test_bad_images(target: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(image_batches(fill(target, files), 2))


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageSource(tmp_path / "none")
    (tmp_path / "torn.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is not a readable zip"):
        ImageSource(tmp_path / "torn.zip")
    rotten = fill(tmp_path / "rotten.zip", OK)  # stored, not packed
    content = bytearray(rotten.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    rotten.write_bytes(content)
    with pytest.raises(ValueError, match="0.png in .*Bad CRC-32"):
        list(image_batches(rotten, 2))
    with pytest.raises(ValueError, match="3 images were asked for, found 2"):
        list(image_batches(fill(tmp_path / "two", OK), 2, num=3))


def test_threads_decode_ahead_but_not_far(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is at work the next one is decoded, elsewhere, and no more than that."""
    fill(target, {f"{i:03}.png": encoded(i)[1] for i in range(40)})
    seen: list[tuple[int, str]] = []
    read = ImageSource.read

    def noted(source: ImageSource, index: int) -> np.ndarray:
        image = read(source, index)
        seen.append((index, threading.current_thread().name))
        return image

    monkeypatch.setattr(ImageSource, "read", noted)
    batches = image_batches(target, 8)
    next(batches)
    until = time.monotonic() + 60
    while len(seen) < 17 and time.monotonic() < until:  # the first image twice, for its size
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(index for index, _ in seen) == sorted([0, *range(16)])
    assert {name for _, name in seen[1:]} & {threading.current_thread().name} == set()
    before = threading.active_count()
    batches.close()  # leaves no thread behind
    assert threading.active_count() < before
