"""Pixels: the published rounding, and every image where it belongs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.images import film_strip, image_grid, read_png, save_png, to_uint8, to_uint8_tensor

LEVELS = torch.arange(256, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inside", [0.01, 0.5, 0.99])
def test_bytes_are_rounded_down_as_published(dtype: torch.dtype, inside: float) -> None:
    x = ((LEVELS + inside - 128) / 127.5).to(dtype).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(x)[0, :, :, 0].ravel(), np.arange(256))


def test_bytes_are_clipped_and_channels_go_last() -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 0.5]).reshape(1, 3, 1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        assert to_uint8(x.to(dtype)).tolist() == [[[[0, 128, 255], [0, 255, 191]]]]
        assert to_uint8_tensor(x.to(dtype)).tolist() == [[[[0, 0]], [[128, 255]], [[255, 191]]]]


def test_a_diverged_image_is_named() -> None:
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 1] = float("nan")
    x[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"^image 2 .*2 of 4"):
        to_uint8(x)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_gives_the_bytes_back(tmp_path: Path, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    save_png(tmp_path / "a" / "image.png", image)
    back = np.asarray(Image.open(tmp_path / "a" / "image.png")).reshape(image.shape)
    assert np.array_equal(back, image)
    assert np.array_equal(read_png(tmp_path / "a" / "image.png"), image)


def tiles(count: int, size: tuple[int, int] = (4, 6)) -> list[np.ndarray]:
    return [np.full((*size, 3), 10 + n, dtype=np.uint8) for n in range(count)]


def test_grid_goes_row_by_row_and_leaves_the_rest_white() -> None:
    grid = image_grid(tiles(5), columns=3)
    assert grid.shape == (8, 18, 3)
    assert grid[::4, ::6, 0].tolist() == [[10, 11, 12], [13, 14, 255]]
    assert grid[3::4, 5::6, 2].tolist() == [[10, 11, 12], [13, 14, 255]]


@pytest.mark.parametrize("width", [20, 90])  # headings turned upright, and flat
def test_headings_stand_over_their_columns_and_beside_their_rows(width: int) -> None:
    images = tiles(6, (20, width))
    plain = image_grid(images, columns=3)
    grid = image_grid(images, 3, labels=["Heun-35", "", "Euler"], row_labels=["seed 7", ""])
    assert np.array_equal(grid[-plain.shape[0] :, -plain.shape[1] :], plain)
    above = grid[: -plain.shape[0], -plain.shape[1] :].min(axis=(0, 2)).reshape(3, width).min(1)
    assert (above < 100).tolist() == [True, False, True]
    beside = grid[-plain.shape[0] :, : -plain.shape[1]].min(axis=(1, 2)).reshape(2, 20).min(1)
    assert (beside < 100).tolist() == [True, False]


def test_grid_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="2 labels for 3 columns"):
        image_grid(tiles(5), 3, labels=["a", "b"])
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        image_grid(tiles(5), 3, row_labels=["a"])
    with pytest.raises(ValueError, match="0 images in 3 columns"):
        image_grid([], 3)


def test_film_strip_has_a_row_per_sample_and_a_column_per_time() -> None:
    level = (torch.arange(6.0).reshape(3, 2) - 127.5) / 127.5  # (T, B): byte t * 2 + b
    strip = film_strip(level[:, :, None, None, None].expand(3, 2, 3, 4, 4))
    assert strip.shape == (8, 12, 3)
    assert strip[::4, ::4, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
