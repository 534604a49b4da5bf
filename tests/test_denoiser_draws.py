"""What is random in the training of denoisers, and its schedules, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from denoisers.training.augment import DRAWS, Change
from denoisers.training.batches import PARTS, Order, TrainingBatch, shares
from denoisers.training.trainer import Examples, Recipe
from runtime.dist import World
from runtime.errors import UserError
from runtime.noise import SeedNoise
from tests.denoiser_problems import CPU, flat_batch


def examples(count: int, recipe: Recipe, classes: int = 0, withhold: float = 0.0) -> Examples:
    """Of single pixels: many draws at little cost."""
    chance = SeedNoise(range(count)).normal("train", (sum(PARTS) + 1,))
    images = torch.full((count, 1, 1, 1), 255, dtype=torch.uint8)
    return Examples.make(
        TrainingBatch(images, torch.arange(count) % max(classes, 1), chance),
        recipe,
        classes,
        withhold,
        CPU,
    )


# Order


@pytest.mark.parametrize(
    ("size", "batch", "ranks"), [(10, 4, 1), (10, 4, 2), (7, 6, 3), (11, 24, 4)]
)
def test_every_image_comes_once_in_every_pass(size: int, batch: int, ranks: int) -> None:
    passes = 4
    numbers: list[int] = []
    shared = [shares(0, batch, World(rank, ranks, CPU)) for rank in range(ranks)]
    while len(numbers) < passes * size:
        parts = [next(share) for share in shared]
        assert {len(part) for part in parts} == {batch // ranks}
        numbers += sorted(n for part in parts for n in part)
    assert numbers == list(range(len(numbers)))
    order = Order(size, seed=1)
    seen = [tuple(order(n) for n in range(i * size, (i + 1) * size)) for i in range(passes)]
    assert all(sorted(one) == list(range(size)) for one in seen)
    assert len(set(seen)) == passes and seen[0] != tuple(map(Order(size, seed=2), range(size)))
    late = Order(size, seed=1)  # which begins in the middle, as a worker of a continued run does
    assert [late(n) for n in range(2 * size + 1, 3 * size)] == list(seen[2][1:])
    assert list(next(shares(batch, batch, World(1, 2, CPU)))) == list(
        range(batch + 1, 2 * batch, 2)
    )


def test_places_in_a_pass_are_uniform() -> None:
    first = [Order(10, seed)(0) for seed in range(2000)]
    assert scipy.stats.chisquare(np.bincount(first, minlength=10)).pvalue > 1e-3


# Draws


def test_noise_levels_are_log_normal_and_noise_is_normal() -> None:
    made = examples(8192, Recipe(kimg=1, p_mean=-0.7, p_std=1.5, flip=False))
    levels = made.sigma.log().flatten()
    assert scipy.stats.kstest(levels, "norm", (-0.7, 1.5)).pvalue > 1e-3
    noise = ((made.noisy - made.clean) / made.sigma).flatten()
    assert (made.clean == 1).all() and scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise, levels)[0, 1]) < 4 / 8192**0.5
    assert len(levels.unique()) > 8180  # nothing comes twice, but for rounding


def test_half_of_the_images_are_mirrored() -> None:
    batch = flat_batch(0, 4000, (3, 2, 2))
    batch.images.copy_(torch.tensor([255, 0], dtype=torch.uint8))
    plain = batch.images / 127.5 - 1
    kept = Examples.make(batch, Recipe(kimg=1, flip=False), 0, 0.0, CPU)
    assert torch.equal(kept.clean, plain)
    made = Examples.make(batch, Recipe(kimg=1), 0, 0.0, CPU)
    mirrored = made.clean[:, 0, 0, 1] == 1
    assert abs(int(mirrored.sum()) - 2000) < 4 * 1000**0.5
    assert torch.equal(made.clean[~mirrored], plain[~mirrored])
    assert torch.equal(made.clean[mirrored].flip(3), plain[mirrored])
    assert abs(np.corrcoef(mirrored, batch.chance[:, 0])[0, 1]) < 4 / 4000**0.5


def test_classes_are_withheld_as_often_as_the_network_says() -> None:
    made = examples(4000, Recipe(kimg=1), classes=4, withhold=0.2)
    told = made.labels.sum(1)
    assert abs(int((told == 0).sum()) - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5
    assert torch.equal(made.labels.argmax(1)[told == 1], torch.arange(4000)[told == 1] % 4)
    assert (examples(400, Recipe(kimg=1), 4).labels.sum(1) == 1).all()


def test_images_are_augmented_and_labelled_by_the_same_draw() -> None:
    batch = flat_batch(0, 32)
    batch.images.copy_(torch.randint(0, 256, batch.images.shape, dtype=torch.uint8))
    plain = batch.images / 127.5 - 1
    change = Change.draw(batch.chance[:, 2 : 2 + DRAWS], 0.5, mirror=True)
    made = Examples.make(batch, Recipe(kimg=1, augment=0.5), 0, 0.0, CPU)
    assert torch.equal(made.clean, change.warp(change.flip(plain)))
    assert torch.equal(made.augment_labels, change.labels())
    noise = ((made.noisy - made.clean) / made.sigma).flatten(1)
    assert (noise - batch.chance[:, 2 + DRAWS :]).abs().max() < 1e-3
    assert Examples.make(batch, Recipe(kimg=1), 0, 0.0, CPU).augment_labels is None


# Schedules


def test_the_learning_rate_at_its_corners() -> None:
    recipe = Recipe(kimg=10, batch=100, lr=0.5, rampup_kimg=2, decay_kimg=4)
    corners = {0: 0.025, 900: 0.25, 1900: 0.5, 6000: 0.5, 8000: 0.25, 9900: 0.0125, 10000: 0}
    for images, lr in corners.items():
        assert recipe.learning_rate(images) == pytest.approx(lr, abs=1e-12)
    plain = replace(recipe, rampup_kimg=0, decay_kimg=0)
    assert plain.learning_rate(0) == plain.learning_rate(9900) == 0.5


def test_the_average_forgets_by_its_half_life() -> None:
    recipe = Recipe(kimg=1, batch=10, ema_kimg=0.2, ema_rampup=0.5)
    steps = range(1000, 1200, 10)
    kept = math.prod(recipe.ema_keep(images) for images in steps)
    assert kept == pytest.approx(0.5)  # over 200 images
    assert recipe.ema_keep(100) == pytest.approx(0.5 ** (10 / 50))  # while few were seen
    assert replace(recipe, ema_kimg=0).ema_keep(100) == 0


NONSENSE = {
    "kimg": (0, math.nan, math.inf, -1),
    "batch": (0,),
    "lr": (0.0, -1.0),
    "rampup_kimg": (-1.0,),
    "ema_kimg": (-1.0, math.nan),
    "p_mean": (math.nan,),
    "p_std": (0.0,),
    "augment": (-0.1, 1.1),
    "dtype": ("float8", "Tensor"),
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in NONSENSE.items() for v in vs])
def test_a_recipe_without_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=rf"^--{name} (is {value}; give|'{value}' is unknown; known)"
    ):
        Recipe(**{"kimg": 1, name: value})
