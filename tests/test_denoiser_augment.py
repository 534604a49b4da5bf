"""Augmentation of training images: each transformation against an exact reference."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from denoisers.training.augment import DRAWS, LABELS, OCTAVES, SHIFT, Change
from runtime.noise import SeedNoise


def change(count: int = 2, **given: float) -> Change:
    """Of ``count`` images, nothing but what is given."""
    return Change(*(torch.full((count,), float(given.get(name, 0))) for name in Change._fields))


def noise(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def reflected(images: Tensor, by: int) -> Tensor:
    """With ``by`` more pixels on every side, mirrored at the border."""
    pad = ((0, 0), (0, 0), (by, by), (by, by))
    return torch.from_numpy(np.pad(images.numpy(), pad, mode="symmetric"))


def draws(count: int = 4000) -> Tensor:
    return SeedNoise(range(count)).normal("draws", (DRAWS,))


# Nothing


def test_without_probability_nothing_is_done() -> None:
    z, x = draws(64), noise(8)[:1].expand(64, -1, -1, -1)
    nothing = Change.draw(z, 0.0, mirror=False)
    assert torch.equal(nothing.labels(), torch.zeros(64, LABELS))
    assert torch.equal(nothing.warp(nothing.flip(x)), x)
    mirrored = Change.draw(z, 0.0, mirror=True)
    assert torch.equal(mirrored.labels()[:, 1:], torch.zeros(64, LABELS - 1))
    assert torch.equal(mirrored.warp(x), x)


def test_images_that_stay_are_the_same_to_the_last_bit_beside_others_that_move() -> None:
    x = noise(8)
    out = change(angle=0.3)._replace(angle=torch.tensor([0.0, 0.3])).warp(x)
    assert torch.equal(out[0], x[0]) and (out[1] - x[1]).abs().max() > 0.1


# Each transformation


def test_flips() -> None:
    x = noise(8)
    assert torch.equal(change(mirror=1).flip(x), x.flip(3))
    assert torch.equal(change(upend=1).flip(x), x.flip(2))
    assert torch.equal(change(mirror=1, upend=1).flip(x), x.flip(2, 3))
    assert torch.equal(change(mirror=1, upend=1).warp(x), x)


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("quarters", [1, 2, -1, 4])
def test_quarter_turns(side: int, quarters: int) -> None:
    x = noise(side)
    out = change(angle=quarters * math.pi / 2).warp(x)
    assert (out - torch.rot90(x, quarters, (2, 3))).abs().max() < 2e-5


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 1), (-3, 2), (5, -7)])
def test_shifts_by_whole_pixels(right: int, down: int) -> None:
    x = noise(16)
    out = change(right=right / (16 * SHIFT), down=down / (16 * SHIFT)).warp(x)
    expected = reflected(x, 8)[:, :, 8 - down : 24 - down, 8 - right : 24 - right]
    assert (out - expected).abs().max() < 2e-5


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scales(factor: float) -> None:
    """About the middle pixel of an odd side: these places of the result are pixels of the source.

    At a half, what lies outside is seen: its reflection.
    """
    x, middle = noise(9), 4
    out = change(scale=math.log2(factor) / OCTAVES).warp(x)
    step = 3 if factor == 3 else 1
    places = range(middle % step, 9, step)
    source = [round(middle + (i - middle) / factor) + 4 for i in places]
    expected = reflected(x, 4)[:, :, source][..., source]
    assert (out[:, :, list(places)][..., list(places)] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("upright", [False, True])
def test_stretching_by_two_along_one_axis_halves_the_other(upright: bool) -> None:
    x = noise(9).transpose(2, 3) if upright else noise(9)
    out = change(stretch=1 / OCTAVES, axis=math.pi / 2 * upright).warp(x)
    along, across = [2, 3, 4, 5, 6], [2 * i for i in range(9)]  # for places 0, 2, ... and 0, 1, ...
    wide = reflected(x, 4)
    if upright:
        found, expected = out[:, :, ::2], wide[..., across][:, :, [i + 4 for i in along]]
    else:
        found, expected = out[..., ::2], wide[:, :, across][..., [i + 4 for i in along]]
    assert (found - expected).abs().max() < 2e-5


def test_all_together_move_a_spot_as_complex_numbers_say() -> None:
    """Grown, turned, stretched, moved, in this order: the centre of a spot goes where points go."""
    side, spot = 64, complex(5, 3)  # to the right and up, in pixels from the middle
    given = dict(scale=0.8, angle=1.1, stretch=-1.5, axis=0.6, right=0.4, down=-0.7)
    place = torch.arange(side) - (side - 1) / 2
    up, right = -place[:, None], place[None, :]
    image = torch.exp(-((right - spot.real) ** 2 + (up - spot.imag) ** 2) / 20)
    out = change(1, **given).warp(image[None, None])[0, 0]
    out = out / out.sum()
    found = complex(float((out * right).sum()), float((out * up).sum()))

    point = spot * 2 ** (OCTAVES * given["scale"]) * cmath.exp(1j * given["angle"])
    turned, factor = point * cmath.exp(-1j * given["axis"]), 2 ** (OCTAVES * given["stretch"])
    stretched = complex(turned.real * factor, turned.imag / factor)
    point = stretched * cmath.exp(1j * given["axis"])
    point += side * SHIFT * complex(given["right"], -given["down"])
    assert abs(found - point) < 0.02 < abs(point - spot)


# Labels and chances


def test_labels_say_what_was_done() -> None:
    given = dict(mirror=1, upend=1, scale=0.8, angle=1.1, stretch=-1.5, axis=0.6, right=2, down=-3)
    expected = [1, 1, 0.8, math.cos(1.1) - 1, math.sin(1.1)]
    expected += [-1.5 * math.cos(0.6), -1.5 * math.sin(0.6), 2, -3]
    assert change(1, **given).labels()[0].tolist() == pytest.approx(expected)
    assert (change(angle=2 * math.pi).labels().abs() < 1e-6).all()


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_transformations_are_as_frequent_and_as_strong_as_published(p: float) -> None:
    z = draws()
    drawn = Change.draw(z, p, mirror=True)
    chances = dict(mirror=0.5, upend=p / 2, scale=p, angle=p, stretch=p, right=p, down=p)
    for name, chance in chances.items():
        done = int((getattr(drawn, name) != 0).sum())
        assert abs(done - 4000 * chance) <= 4 * (4000 * chance * (1 - chance)) ** 0.5, name
    assert torch.equal(drawn.right != 0, drawn.down != 0)
    assert torch.equal(drawn.stretch != 0, drawn.axis != 0)
    if p < 1:  # whether one is done says nothing about another
        moved = torch.stack([getattr(drawn, name) != 0 for name in list(chances)[:-1]])
        assert np.abs(np.corrcoef(moved) - np.eye(6)).max() < 4 / 4000**0.5
    turn = (-math.pi, 2 * math.pi)
    for name, law in (
        *((name, ("norm",)) for name in ("scale", "stretch", "right", "down")),
        *((name, ("uniform", turn)) for name in ("angle", "axis")),
    ):
        values = getattr(drawn, name)
        assert scipy.stats.kstest(values[values != 0], *law).pvalue > 1e-3, name
    together = np.corrcoef(torch.stack([v for k, v in drawn._asdict().items() if k != "down"]))
    assert np.abs(together - np.eye(7)).max() < 4 / 4000**0.5
