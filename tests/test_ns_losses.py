"""Losses of NS solvers, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ns.losses import HUBER, EnergyDistance, feature_distance, pseudo_huber, spectral, statistics
from ns.spectrum import SpectralNorm, ring_means, rings
from solvers.types import Denoised
from tests.test_ns_calibrate import denoiser

PLAIN = spectral(SpectralNorm(torch.ones(8, 8, dtype=torch.float64)))


def images(count: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def test_pseudo_huber_is_quadratic_in_small_errors_and_linear_in_large_ones() -> None:
    c = HUBER * math.sqrt(192)
    unit = images(1)
    unit = unit / unit.norm()
    for size, wanted in ((1e-2 * c, 0.5e-4 * c), (1e3 * c, 999 * c)):
        found = pseudo_huber(images(1) + size * unit, images(1), denoiser())
        assert float(found) == pytest.approx(wanted, rel=1e-3)


class Halves:
    """The features of an image are its first channel, half as large at each next level."""

    cost = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(x, x[:, 0] / (1 + sigma))


class Featureless:
    cost = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(x, None)


def test_the_distance_of_features_is_relative_to_the_teachers() -> None:
    """What is not in the features does not count, and their scale at a level cancels."""
    teacher, other = images(4), images(4, seed=1)
    other[:, 0] = 1.1 * teacher[:, 0]
    found = feature_distance(other, teacher, Halves())
    assert torch.allclose(found, torch.full((4,), 0.01, dtype=torch.float64))
    other.requires_grad_()
    (gradient,) = torch.autograd.grad(feature_distance(other, teacher, Halves()).sum(), other)
    assert float(gradient[:, 0].abs().min()) > 0 and float(gradient[:, 1:].abs().max()) == 0
    with pytest.raises(ValueError, match="no bottleneck features"):
        feature_distance(teacher, teacher, Featureless())


def test_rings_hold_all_power() -> None:
    power = images(2).square()
    counts = torch.bincount(rings(8, 8).flatten())
    assert torch.allclose((ring_means(power) * counts).sum(-1), power.sum((-2, -1)))


def test_statistics_tell_frequency_from_frequency() -> None:
    """A wave has its power in one ring; a constant moves the mean and no ring."""
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(8, dtype=torch.float64) / 8)
    image = wave.expand(1, 1, 8, 8)
    logs = statistics(image)[0, :-1]
    assert int(logs.argmax()) == 2  # ring 3; ring 0 is left out
    assert float(logs.max() - logs.sort().values[-2]) > 10
    assert torch.allclose(
        statistics(image + 5) - statistics(image), 5 * (torch.arange(7) == 6).double()
    )


def test_the_energy_distance_is_zero_for_the_same_distribution_alone() -> None:
    """Its mean over draws has no bias, however small they are; other spectra are told apart."""
    term = EnergyDistance.to([images(400, 1), images(400, 2)], PLAIN, 1.0)
    draws = [float(term.distance(images(4, seed)).mean()) for seed in range(10, 74)]
    mean, deviation = torch.tensor(draws).mean(), torch.tensor(draws).std()
    assert abs(float(mean)) < 4 * float(deviation) / 8
    assert float(term.distance(images(64, 5, scale=1.3)).mean()) > 20 * float(deviation) / 8


def test_the_energy_distance_is_that_of_its_definition() -> None:
    reference, some = images(6, 1), images(3, 2)
    term = EnergyDistance.to([reference[:4], reference[4:]], PLAIN, 0.5)
    x, y = (statistics(part) / statistics(reference).std(0) for part in (some, reference))

    def apart(a: Tensor, b: Tensor) -> list[float]:
        return [float((p - q).norm()) for p in a for q in b]

    within = [sum(apart(part, part)) / (len(part) * (len(part) - 1)) for part in (x, y)]
    wanted = sum(apart(x, y)) / 18 - sum(within) / 2
    assert float(term.distance(some).mean()) == pytest.approx(wanted)
    both = term(some, images(3), denoiser()).mean()
    assert float(both) == pytest.approx(
        float(PLAIN(some, images(3), denoiser()).mean()) + wanted / 2
    )


def test_gradients_of_the_energy_distance_are_finite() -> None:
    term = EnergyDistance.to([images(50, 1)], PLAIN, 1.0)
    some = images(4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(term.distance(some).sum(), some)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
    with pytest.raises(ValueError, match="a portion, which has 1"):
        term.distance(some[:1])
