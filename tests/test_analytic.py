"""Closed-form denoisers against recorded vectors, densities and the ODE they solve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from denoisers.analytic import GaussianDenoiser, MixtureDenoiser

SHAPE = (2, 3, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def level(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_mixture_matches_the_recorded_denoiser(golden: Callable[[str], Any]) -> None:
    file = golden("denoiser")
    mixture = MixtureDenoiser(torch.tensor(file["means"]), float(file["s"]))
    for i, sigma in enumerate(file["sigmas"]):
        x, sigma = torch.tensor(file[f"x_{i}"]), torch.tensor(sigma)
        assert relative(mixture(x, sigma).x0, torch.tensor(file[f"D64_{i}"])) < 1e-10
        # Sums of 192 squares of size sigma^2: both float32 runs are this far from float64.
        low = mixture(x.float(), sigma).x0
        assert low.dtype == torch.float32
        assert float((low - torch.tensor(file[f"D32_{i}"])).abs().max()) < 5e-5
        assert float((low - torch.tensor(file[f"D64_{i}"])).abs().max()) < 5e-5
    sigma = torch.tensor(file["sigma_mix"]).reshape(-1, 1, 1, 1)
    mixed = mixture(torch.tensor(file["x_mix"]), sigma).x0
    assert relative(mixed, torch.tensor(file["D64_mix"])) < 1e-10


@pytest.mark.parametrize("sigma", [0.05, 1.3, 40.0])
def test_mixture_is_the_score_of_its_density(sigma: float) -> None:
    """Tweedie: D = x + sigma^2 grad log p, p written with torch.distributions."""
    means, std = draw(3, *SHAPE), torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    x = draw(5, *SHAPE, seed=1).mul(1 + sigma).requires_grad_()
    log_p = torch.stack(
        [
            Independent(Normal(m, (s**2 + sigma**2).sqrt()), 3).log_prob(x) + w.log()
            for m, s, w in zip(means, std, weights, strict=True)
        ]
    ).logsumexp(0)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    got = MixtureDenoiser(means, std, weights * 7)(x.detach(), level(sigma)).x0
    assert relative(got, x.detach() + sigma**2 * score) < 1e-10


def covariance() -> Tensor:
    factor = draw(24, 24, seed=3)
    return factor @ factor.T / 24


@pytest.mark.parametrize("sigma", [0.05, 1.3, 40.0])
def test_gaussian_is_the_score_of_its_density(sigma: float) -> None:
    mean, cov = draw(*SHAPE), covariance()
    x = draw(5, *SHAPE, seed=1).requires_grad_()
    total = cov + sigma**2 * torch.eye(24, dtype=torch.float64)
    log_p = MultivariateNormal(mean.flatten(), total).log_prob(x.flatten(1))
    (score,) = torch.autograd.grad(log_p.sum(), x)
    got = GaussianDenoiser.from_covariance(mean, cov)(x.detach(), level(sigma)).x0
    assert relative(got, x.detach() + sigma**2 * score) < 1e-9


def test_diagonal_full_and_one_component_agree() -> None:
    mean, x, sigma = draw(*SHAPE), draw(4, *SHAPE, seed=1), level(0.7)
    variances = draw(*SHAPE, seed=2).square()
    diagonal = GaussianDenoiser(mean, variances)
    full = GaussianDenoiser.from_covariance(mean, torch.diag(variances.flatten()))
    assert relative(full(x, sigma).x0, diagonal(x, sigma).x0) < 1e-13
    round_one = GaussianDenoiser(mean, 0.09)
    mixture = MixtureDenoiser(mean[None], 0.3)
    assert relative(mixture(x, sigma).x0, round_one(x, sigma).x0) < 1e-13


@pytest.mark.parametrize("full", [False, True])
def test_solution_solves_the_ode(full: bool) -> None:
    """x(start) = x, and dx/dsigma = (x - D(x; sigma)) / sigma along the way."""
    mean = draw(*SHAPE)
    gaussian = (
        GaussianDenoiser.from_covariance(mean, covariance())
        if full
        else GaussianDenoiser(mean, draw(*SHAPE, seed=2).square())
    )
    start, x = 20.0, draw(2, *SHAPE, seed=1) * 20
    assert relative(gaussian.solution(x, start, start), x) < 1e-14
    for end in (20.0, 3.0, 0.4, 0.01):
        t = level(end)
        state, slope = torch.autograd.functional.jvp(
            lambda t: gaussian.solution(x, start, t), t, torch.ones_like(t)
        )
        assert relative(slope, (state - gaussian(state, t).x0) / t) < 1e-9


@pytest.mark.parametrize(
    "denoiser",
    [
        GaussianDenoiser(draw(*SHAPE), 0.3),
        GaussianDenoiser.from_covariance(draw(*SHAPE), covariance()),
        MixtureDenoiser(draw(3, *SHAPE), 0.4),
    ],
    ids=["diagonal", "full", "mixture"],
)
def test_samples_stand_alone_and_carry_their_own_sigma(denoiser: GaussianDenoiser) -> None:
    x = draw(3, *SHAPE, seed=5) * 2
    sigma = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    whole = denoiser(x, sigma.reshape(-1, 1, 1, 1))
    assert whole.feat is not None
    for i in range(3):
        alone = denoiser(x[i : i + 1], sigma[i])
        assert relative(alone.x0, whole.x0[i : i + 1]) < 1e-13
        expected = x[i].mean(0) / math.sqrt(1 + float(sigma[i]) ** 2)
        assert relative(whole.feat[i], expected) < 1e-13


def test_impossible_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variance is -1\.0"):
        GaussianDenoiser(0.0, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"shape \(3, 3\); the mean needs \(24, 24\)"):
        GaussianDenoiser.from_covariance(draw(*SHAPE), torch.eye(3))
