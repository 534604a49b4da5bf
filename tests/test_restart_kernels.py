"""Jumps of PFGM++: the one law that is right, against closed forms, and what is not right.

Probabilities are those of a Kolmogorov-Smirnov distance as large as the one found; seeds are fixed,
and a right law fails a check of ``LIKELY`` once in a thousand choices of them.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from denoisers.prior import unit_noise
from plans.pfgmpp import spread
from plans.plan import Jump, Solve, run_plan
from plans.process import ForwardProcess
from plans.stochastic import edm_plan
from plans.walk import Churn
from restart.tables import published_grid
from runtime.noise import SeedNoise
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.types import Denoised
from tests.sampler_models import make_card

LIKELY, UNLIKELY = 1e-3, 1e-6
SCORES = torch.linspace(-4.99, 4.99, 4001, dtype=torch.float64)
WEIGHTS = torch.from_numpy(stats.norm.pdf(SCORES.numpy())) * (SCORES[1] - SCORES[0])
HEUN = make_solver("heun")
many = np.random.default_rng


def strengths(c: float, D: int, draw: Tensor = SCORES) -> Tensor:
    """V for r_hi = 1: its quantiles at normal scores."""
    return spread(c, D, draw[:, None]).flatten() ** 2 * (1 - c) * (1 + c) / D


def fits(sample: np.ndarray, cdf) -> float:
    return float(stats.kstest(sample, cdf).pvalue)


# --- the law of the strength ----------------------------------------------------------------


@pytest.mark.parametrize("c", [0.001, 0.95])
def test_one_added_dimension_is_cauchy_noise(c):
    """D = 1: V is the time of Brownian motion from 1 to c, ``((1 - c) / |z|)^2``."""
    half = torch.special.ndtr(SCORES) / 2
    exact = ((1 - c) / torch.special.ndtri(half)) ** 2
    inside = SCORES.abs() < 4  # of heavy tails
    torch.testing.assert_close(strengths(c, 1)[inside], exact[inside], rtol=2e-4, atol=0)


@pytest.mark.parametrize("D", [2, 3, 16, 64, 79, 80, 128])
@pytest.mark.parametrize("c", [0.05, 0.5, 0.95])
def test_laplace_transform_is_the_ratio_of_bessel_functions(D, c):
    """From the quantiles back; both ways of computing the transform meet at D = 80."""
    v, nu = strengths(c, D), D / 2
    for s in (0.1 * D, D, 10 * D):
        q = math.sqrt(2 * s)
        exact = special.kve(nu, q) / special.kve(nu, c * q) / c**nu * math.exp((c - 1) * q)
        got = float(WEIGHTS @ torch.exp(-s * v))
        assert got == pytest.approx(exact, abs=3e-6)
        if D == 3:
            assert exact == pytest.approx((1 + q) / (1 + c * q) * math.exp((c - 1) * q))


@pytest.mark.parametrize("D", [64, 2048])
@pytest.mark.parametrize("c", [0.0, 0.2, 0.9])
def test_mean_and_variance_are_differences(D, c):
    """Cumulants of W add up: those of V are ``1 - c^2`` and ``1 - c^4`` times those of W."""
    v = strengths(c, D)
    mean = float(WEIGHTS @ v)
    assert mean * (D - 2) == pytest.approx(1 - c**2, rel=1e-5)
    variance = float(WEIGHTS @ (v - mean) ** 2)
    assert variance * (D - 2) ** 2 * (D - 4) / 2 == pytest.approx(1 - c**4, rel=2e-4)


def test_from_no_noise_at_all_the_strength_is_that_of_the_prior():
    for D in (1, 16, 2048):
        exact = 1 / torch.from_numpy(special.chdtri(D, torch.special.ndtr(SCORES).numpy()))
        torch.testing.assert_close(strengths(0.0, D), exact, rtol=1e-8, atol=0)
        torch.testing.assert_close(strengths(1e-4, D), exact, rtol=1e-3, atol=0)


def test_ratios_near_one_and_scores_far_out_have_a_strength():
    wild = torch.tensor([[-40.0], [0.0], [40.0]])
    for D in (1, 64, 2048):
        found = spread(1 - 1e-14, D, wild).flatten()
        assert bool((found > 0).all() and found.isfinite().all() and (found.diff() > 0).all())


# --- the right distribution -----------------------------------------------------------------


def hidden(D: int, c: float, move) -> float:
    """Fit of ``W_lo + V`` to the law of ``W_hi``, in 100,000 draws."""
    rng = many(1)
    low = c**2 / rng.chisquare(D, 100_000)
    return fits(low + move(rng, D, c), lambda w: stats.chi2.sf(1 / w, D))


def ours(rng, D: int, c: float) -> np.ndarray:
    return strengths(c, D, torch.from_numpy(rng.standard_normal(100_000))).numpy()


def along(rng, D: int, c: float, sign: int = 0) -> np.ndarray:
    """Along a random direction in the augmented space, from radius c to radius 1.

    Uniform in R^(n + D), the direction makes an angle with the radius whose cosine squared is
    Beta(1/2, (D - 1)/2); the way across is a root of ``w^2 + 2 c cos w + c^2 = 1``, and per unit of
    it the state moves by Student's t.  ``sign`` 0 takes the cosine with either sign, as it comes;
    1 and -1 always outwards and always inwards.
    """
    cosine = np.sqrt(rng.beta(0.5, (D - 1) / 2, 100_000)) if D > 1 else np.ones(100_000)
    cosine *= sign or rng.choice([-1, 1], 100_000)
    way = np.sqrt((c * cosine) ** 2 + 1 - c**2) - c * cosine
    return way**2 / rng.chisquare(D, 100_000)


@pytest.mark.parametrize("D", [1, 3, 16, 2048])
@pytest.mark.parametrize("c", [0.2, 0.95])
def test_strengths_add_up_to_the_law_at_the_higher_level(D, c):
    assert hidden(D, c, ours) > LIKELY


@pytest.mark.parametrize(("D", "c"), [(16, 0.7), (64, 0.7), (2048, 0.7), (2048, 0.2)])
def test_one_root_alone_is_wrong(D, c):
    """Always the longer or always the shorter way: the strength is off by ``O(1/sqrt D)``."""
    for sign in (-1, 1):
        assert hidden(D, c, partial(along, sign=sign)) < UNLIKELY
    excess = along(many(2), D, c, -1).mean() * (D - 2) / (1 - c**2) - 1
    assert excess > 0.5 * 2 * c * math.sqrt(2 / (math.pi * D * (1 - c**2)))


def test_roots_of_both_signs_are_the_same_move_in_opposite_directions():
    """``|z + w v| = 1`` has a positive and a negative root; v to -v turns one into the other.

    So the sign of the root alone means nothing where the direction is uniform; what matters is
    that the angle comes with both signs.
    """
    rng, c = many(3), 0.6
    z, v = rng.standard_normal((2, 50, 7))
    z *= c / np.linalg.norm(z, axis=1, keepdims=True)

    def roots(v: np.ndarray) -> list[np.ndarray]:
        a, b = (v * v).sum(1), (v * z).sum(1)
        root = np.sqrt(b**2 + a * (1 - c**2))
        return [(-b - root) / a, (-b + root) / a]

    (low, high), (opposite_low, opposite_high) = roots(v), roots(-v)
    assert (low < 0).all() and (high > 0).all()
    assert np.abs(np.linalg.norm(z + high[:, None] * v, axis=1) - 1).max() < 1e-12
    assert np.abs(low + opposite_high).max() < 1e-12 > np.abs(high + opposite_low).max()


def test_a_random_direction_is_right_from_the_data_and_nearly_so_from_above():
    """From radius 0 it is the kernel itself; from c the mean is too large by ``2 c^2 / D``."""
    for D in (1, 16, 2048):
        assert hidden(D, 0.0, along) > LIKELY
    for D, c in ((3, 0.5), (16, 0.7), (64, 0.9)):
        assert hidden(D, c, along) < UNLIKELY
    for D in (16, 128):
        mean = along(many(4), D, 0.7).mean() * (D - 2)
        assert mean == pytest.approx(1 - 0.49 + 2 * 0.49 / D, rel=0.01)
    assert hidden(2048, 0.2, along) > LIKELY  # at the published D and levels nobody can tell


# --- jumps of states ------------------------------------------------------------------------


def card(D: int | None):
    return dataclasses.replace(make_card(), channels=1, resolution=2, pfgmpp=D, guidance=None)


def jumped(D: int, pfgmpp: int | None, low: float, high: float, count: int = 4000) -> Tensor:
    """Noise of PFGM++ at ``low`` after a jump to ``high``, (count, 4)."""
    noise = SeedNoise(range(count))
    normal = partial(noise.normal, shape=(1, 2, 2), dtype=torch.float64)
    x = low * unit_noise(card(D), noise, "latent", torch.float64, "cpu")
    process = ForwardProcess(normal, pfgmpp)
    plan = (Jump(low, high, ("restart", 0, 0)),)
    return run_plan(plan, lambda *_: None, x, process).x[-1].flatten(1)


@pytest.mark.parametrize(("D", "low", "high"), [(1, 0.5, 1.0), (3, 0.06, 0.3), (16, 2.0, 2.5)])
def test_a_jump_lands_on_the_law_of_its_level(D, low, high):
    """``|x|^2 / (n sigma^2)`` has the F law of n and D degrees, each pixel Student's t."""
    right, wrong = jumped(D, D, low, high) / high, jumped(D, None, low, high) / high
    norms = lambda x: (x.square().sum(1) / 4).numpy()  # noqa: E731
    assert fits(norms(right), stats.f(4, D).cdf) > LIKELY
    assert fits(norms(wrong), stats.f(4, D).cdf) < (UNLIKELY if high / low > 1.5 else 1)
    for pixel in right.T.numpy():
        assert fits(pixel, stats.t(D).cdf) > LIKELY


def test_many_added_dimensions_are_the_gaussian_jump_of_the_same_seeds():
    """The difference goes to zero as ``1 / sqrt D``, path by path."""
    low, high, worst = 0.06, 0.3, {}
    gaussian = jumped(10**6, None, low, high, 200)
    for D in (10**2, 10**4):
        noise = SeedNoise(range(200)).normal(("restart", 0, 0), (4,), torch.float64)
        start = jumped(D, None, low, high, 200) - Jump(low, high, ("a",)).std * noise
        end = jumped(D, D, low, high, 200)
        ratio = (end - start) / (Jump(low, high, ("a",)).std * noise)
        assert float((ratio - ratio[:, :1]).abs().max()) < 1e-6  # one strength for all pixels
        worst[D] = float((ratio - 1).square().mean().sqrt())
        theory = math.sqrt((high**2 + low**2) / (high**2 - low**2) / (2 * D))
        assert worst[D] == pytest.approx(theory, rel=0.15)
    assert worst[10**4] < 0.011 and gaussian.shape == (200, 4)


class Points:
    """The ideal denoiser of PFGM++ for data at +1 and -1 in every pixel (2302.04265, eq. 4)."""

    cost = 1

    def __init__(self, D: int) -> None:
        self.D = D

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        means = torch.tensor([1.0, -1.0], dtype=x.dtype).reshape(2, 1, 1, 1, 1)
        squares = (x - means).square().flatten(2).sum(2) + sigma**2 * self.D
        weights = (-(x[0].numel() + self.D) / 2 * squares.log()).softmax(0)
        return Denoised((weights[..., None, None, None] * means).sum(0).expand_as(x), None)


def test_jump_and_descent_keep_the_marginal_of_a_mixture():
    """Up and down again twice: the law at the lower level, of data at two points, stays."""
    D, low, high = 1, 0.3, 1.5
    noise = SeedNoise(range(2000))
    normal = partial(noise.normal, shape=(1, 2, 2), dtype=torch.float64)
    side = 2.0 * noise.integers("side", 2) - 1
    x = side.reshape(-1, 1, 1, 1) + low * unit_noise(card(D), noise, "latent", torch.float64, "cpu")
    down = get_grid("polynomial", 16, low, high, 7)
    plan = sum(((Jump(low, high, ("up", k)), Solve(HEUN, down)) for k in range(2)), ())

    def cdf(pixel: np.ndarray) -> np.ndarray:
        return sum(stats.t(D, m, low).cdf(pixel) for m in (-1, 1)) / 2

    for kernel, right in ((D, True), (None, False)):
        end = run_plan(plan, Points(D), x, ForwardProcess(normal, kernel)).x[-1]
        p = fits(end[:, 0, 0, 0].numpy(), cdf)
        assert p > LIKELY if right else p < UNLIKELY
        changed = float((end.mean((1, 2, 3)).sign() != side).double().mean())
        assert 0.05 < changed < 0.5  # the jumps do mix


def test_jumps_belong_to_seed_and_name():
    plan = edm_plan(published_grid(5), Churn(3.0))
    assert str(plan[0]) == "jump 80 -> 113.137 with noise 80"

    def images(seeds, skip=0):
        normal = partial(SeedNoise(seeds).normal, shape=(1, 2, 2), dtype=torch.float64)
        x = plan[skip].start * normal("latent")
        return run_plan(plan[skip:], Points(64), x, ForwardProcess(normal, 64))

    whole = images([7, 3, 9])
    parts = torch.cat([images([7]).x, images([3, 9]).x], dim=1)
    torch.testing.assert_close(whole.x, parts, atol=1e-12, rtol=0)
    assert whole.nfe == run_plan(plan, Points(64), whole.x[0], lambda _: 0 * whole.x[0]).nfe
    names: list[tuple] = []

    def spy(name):
        names.append(name)
        return torch.zeros(1, 1, 2, 2)

    run_plan(plan, Points(64), torch.zeros(1, 1, 2, 2), ForwardProcess(spy, 64))
    assert names[:2] == [("churn", 0), ("churn", 0, "spread")] and len(set(names)) == len(names)
