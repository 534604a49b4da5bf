"""DDPM's ancestral sampler as a plan: posterior, marginals, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from denoisers.analytic import GaussianDenoiser
from plans.plan import Jump, plan_nfe, run_plan
from plans.stochastic import ddpm_plan
from restart.tables import published_grid
from runtime.errors import UserError
from solvers.driver import integrate
from solvers.registry import make_solver
from solvers.types import Denoised

VAR = 0.25


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def gaussian() -> GaussianDenoiser:
    zero, var = torch.tensor([0.0, VAR], dtype=torch.float64)
    return GaussianDenoiser(zero, var)


class Constant:
    """Always predicts the same clean image."""

    cost = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(torch.full_like(x, 0.7), None)


@pytest.mark.parametrize(("t", "s"), [(80.0, 57.0), (2.0, 0.03), (1.0, 0.999)])
def test_a_step_is_the_posterior_given_the_denoised_state(t: float, s: float) -> None:
    """By Bayes: the prior N(x0, s^2) of x_s times the likelihood N(x_s, t^2 - s^2) of x_t."""
    precision = 1 / s**2 + 1 / (t**2 - s**2)
    x = column(-0.4, 3.0)
    mean = (0.7 / s**2 + x / (t**2 - s**2)) / precision
    plan = ddpm_plan(torch.tensor([t, s], dtype=torch.float64))
    for draw in (0.0, 1.0, -2.0):
        end = run_plan(plan, Constant(), x, lambda _, z=draw: torch.full_like(x, z)).x[-1]
        assert float((end - mean - draw / math.sqrt(precision)).abs().max()) < 1e-10 * t


def spread(ts: Tensor, eta: float) -> float:
    """Variance at the end on Gaussian data: the walk is linear in the start and in every draw."""
    plan = ddpm_plan(ts, eta)
    names = [part.name for part in plan if isinstance(part, Jump)]
    assert len(set(names)) == len(names)
    start = column(float((VAR + ts[0] ** 2).sqrt()), *[0.0] * len(names))
    rows = {name: column(*[float(i == j) for i in range(len(names) + 1)])
            for j, name in enumerate(names, 1)}  # fmt: skip
    return float(run_plan(plan, gaussian(), start, rows.__getitem__).x[-1].square().sum())


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_variance_of_a_chain_is_that_of_its_recursion(eta: float) -> None:
    """x_s = D + sqrt(s^2 - u^2) (x_t - D)/t + u z, u = eta s sqrt(1 - s^2/t^2): DDIM's eq. 12."""
    ts = published_grid(12)
    var = VAR + float(ts[0]) ** 2
    for t, s in zip(ts.tolist(), ts.tolist()[1:], strict=False):
        shrink, u = VAR / (VAR + t**2), eta * s * math.sqrt(1 - s**2 / t**2)
        var = (shrink + math.sqrt(s**2 - u**2) / t * (1 - shrink)) ** 2 * var + u**2
    assert spread(ts, eta) == pytest.approx(var, rel=1e-10)


def test_the_chain_reaches_the_data_at_first_order() -> None:
    errors = [abs(spread(published_grid(n), 1.0) - VAR) for n in (100, 200, 400)]
    assert errors[-1] < 0.05 * VAR
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.1)


def test_without_noise_it_is_eulers_method() -> None:
    ts, x = published_grid(9), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    plan = ddpm_plan(ts, 0.0)
    assert not any(isinstance(part, Jump) for part in plan)
    walk = integrate(make_solver("euler"), gaussian(), 80 * x, ts)
    assert torch.equal(run_plan(plan, gaussian(), 80 * x, {}.__getitem__).x, walk.x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_interval_costs_one_evaluation_and_the_last_ends_denoised(eta: float) -> None:
    ts, x = published_grid(7), column(1.0, -2.0)
    plan = ddpm_plan(ts, eta)
    walk = run_plan(plan, gaussian(), 80 * x, lambda name: torch.ones_like(x))
    assert walk.nfe == plan_nfe(plan) == 7 and plan_nfe(plan, 2) == 14
    assert torch.equal(walk.x[-1], gaussian()(walk.x[-2], ts[-2]).x0)
    jumps = [part for part in plan if isinstance(part, Jump)]
    assert [jump.t_to for jump in jumps] == ([] if eta == 0 else ts[1:-1].tolist())


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_eta_out_of_range_raises(eta: float) -> None:
    with pytest.raises(UserError, match=f"eta = {eta:g} "):
        ddpm_plan(published_grid(5), eta)
