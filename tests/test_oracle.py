"""The independent oracle: adaptive Dormand-Prince in log sigma against what we know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from denoisers.analytic import GaussianDenoiser, MixtureDenoiser
from solvers.driver import Meter, integrate
from solvers.grids import get_grid
from solvers.oracle import dopri5
from solvers.registry import make_solver

SHAPE = (1, 2, 2)


def latents(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)


def two_components() -> MixtureDenoiser:
    means = torch.stack([torch.full(SHAPE, -0.7), torch.full(SHAPE, 0.9)]).double()
    return MixtureDenoiser(means, torch.tensor([0.3, 0.5]).double(), torch.tensor([0.4, 0.6]))


def test_fine_heun_agrees_on_a_mixture():
    """Two methods that share nothing but the ODE, on a problem without a closed form."""
    coarse = get_grid("logsnr", 9, 0.02, 20.0)
    fine = get_grid("logsnr", 8 * 400 + 1, 0.02, 20.0)
    start = latents() * 20.0
    adaptive = dopri5(two_components(), start, coarse, rtol=1e-9, atol=1e-9)
    heun = integrate(make_solver("heun"), two_components(), start, fine)
    assert adaptive.x.shape == (9, 3, *SHAPE)
    error = (adaptive.x - heun.x[::400]).abs().max()
    assert float(error) < 1e-5
    # The same start split between the components, so the test has seen the hard part.
    assert float(adaptive.x[-1].min()) < -0.3 and float(adaptive.x[-1].max()) > 0.5


def test_gaussian_closed_form():
    mean, var = latents(1)[0], torch.tensor([0.1, 0.5, 1.0, 3.0]).double().reshape(SHAPE)
    ts = get_grid("polynomial", 6, 0.002, 80.0, 7)
    start = latents() * 80.0
    ours = dopri5(GaussianDenoiser(mean, var), start, ts, rtol=1e-8, atol=1e-8)
    times = ts.reshape(-1, 1, 1, 1, 1)
    exact = mean + ((var + times**2) / (var + ts[0] ** 2)).sqrt() * (start - mean)
    torch.testing.assert_close(ours.x, exact, rtol=0, atol=1e-5)
    assert torch.equal(ours.x[0], start) and torch.equal(ours.t, ts)


def test_tighter_tolerance_costs_more_and_is_metered():
    meter = Meter(two_components())
    ts, start = get_grid("logsnr", 3, 0.02, 20.0), latents() * 20.0
    loose = dopri5(meter, start, ts, rtol=1e-4, atol=1e-4)
    tight = dopri5(meter, start, ts, rtol=1e-8, atol=1e-8)
    assert loose.nfe < tight.nfe and meter.nfe == loose.nfe + tight.nfe


def test_zero_is_out_of_reach():
    ts = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="sigma = 0"):
        dopri5(two_components(), latents(), ts)
