"""Rectified flow is the same process in other coordinates: same images, same jumps, same grids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from denoisers.noise_schedules import DiscreteVP, Flow, LinearVP, NoiseSchedule
from denoisers.velocity import VelocityDenoiser
from plans.plan import Plan, run_plan
from plans.process import ForwardProcess
from plans.stochastic import ddpm_plan, edm_plan
from plans.walk import Churn
from restart.build import restart_plan
from restart.intervals import parse_restart_info
from solvers.driver import integrate
from solvers.grids import TimeMaps, get_grid
from solvers.registry import make_solver
from solvers.types import Denoised
from tests.solver_problem import SOLVERS, mixture, relative_error, start

SHIFTS = st.floats(0.1, 20)
TIMES = st.floats(1e-4, 1 - 1e-4)


def velocity(y: Tensor, s: Tensor) -> Tensor:
    """What a perfect network of a flow of `mixture` would predict, ``E[n - x0 | y]``."""
    x0 = mixture()(y / (1 - s), s / (1 - s)).x0
    return (y - x0) / s


FLOW = VelocityDenoiser(velocity)


@given(SHIFTS, TIMES)
def test_a_shift_multiplies_every_noise_level(shift: float, time: float) -> None:
    """The published map of times, static and dynamic, and its inverse."""
    t = torch.tensor(time, dtype=torch.float64)
    flow, plain = Flow(shift), Flow()
    shifted = shift * t / (1 + (shift - 1) * t)
    mu = math.log(shift)
    dynamic = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    torch.testing.assert_close(dynamic, shifted, rtol=1e-12, atol=0)
    sigma = flow.sigma(t)
    torch.testing.assert_close(sigma, shifted / (1 - shifted), rtol=1e-9, atol=0)
    torch.testing.assert_close(sigma, shift * plain.sigma(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(flow.sigma_inv(sigma), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_shift_is_a_positive_number(shift: float) -> None:
    with pytest.raises(ValueError, match="is no factor: give one above 0"):
        Flow(shift)


@pytest.mark.parametrize(
    "process", [LinearVP(), DiscreteVP.from_betas(1e-4, 0.02), Flow(), Flow(3)]
)
def test_the_own_state_has_the_scale_of_its_process(process: NoiseSchedule) -> None:
    """Data and noise have the weights alpha and alpha sigma, which tell the processes apart."""
    sigma = process.sigma(torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64))
    one, alpha = torch.ones(3, dtype=torch.float64), process.own_state(torch.ones(3), sigma)
    noise = process.own_state(sigma, sigma)
    total = alpha + noise if isinstance(process, Flow) else alpha**2 + noise**2
    torch.testing.assert_close(total.double(), one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("afs", [False, True])
def test_every_solver_gives_the_images_of_the_same_mixture(name: str, afs: bool) -> None:
    maps = TimeMaps(Flow(3).sigma, Flow(3).sigma_inv)
    for ts in (
        get_grid("discrete", 7, 0.01, 900.0, 1.0, maps),
        get_grid("polynomial", 7, 0.002, 80.0, 7.0),
    ):
        x = start(float(ts[0]))
        ours, theirs = (integrate(SOLVERS[name], d, x, ts, afs=afs) for d in (FLOW, mixture()))
        assert ours.nfe == theirs.nfe and relative_error(ours.x, theirs.x) < 1e-10


def test_euler_from_pure_noise_is_the_walk_along_the_velocity() -> None:
    """In the flow's own coordinates, from s = 1, where sigma is infinite and ours begins below."""
    ts = torch.tensor([1e5, 9.0, 3.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    s = [1.0, *(ts[1:] / (1 + ts[1:])).tolist()]
    noise = start(1.0)
    mean = mixture().means.mean(0)  # of the data, the best guess from noise alone
    y = noise + (s[1] - s[0]) * (noise - mean)
    for now, after in zip(s[1:], s[2:], strict=False):
        y = y + (after - now) * velocity(y, torch.tensor(now, dtype=torch.float64))
    walk = integrate(make_solver("euler"), FLOW, noise * ts[0], ts)
    assert float((walk.x[-1] - y).abs().max()) < 1e-4


def test_float32_walks_from_there_as_well() -> None:
    ts = torch.tensor([1e5, 9.0, 3.0, 1.0, 0.25], dtype=torch.float64)

    def single(y: Tensor, s: Tensor) -> Tensor:
        return velocity(y.double(), s.double()).float()

    for name in ("euler", "dpmpp", "unipc"):
        walks = [
            integrate(make_solver(name), denoiser, start(1e5, dtype), ts).x[-1].double()
            for denoiser, dtype in (
                (FLOW, torch.float64),
                (VelocityDenoiser(single), torch.float32),
            )
        ]
        assert float((walks[0] - walks[1]).abs().max()) < 1e-4, name


CLOSED = torch.cat([get_grid("polynomial", 8, 0.002, 80.0, 7.0), torch.zeros(1)])
PLANS: dict[str, Plan] = {
    "restart": restart_plan(
        CLOSED, parse_restart_info('{"0": [3, 2, 0.06, 0.3]}'), make_solver("heun")
    ),
    "edm": edm_plan(CLOSED, Churn(S_churn=10)),
    "ddpm": ddpm_plan(CLOSED),
}


@pytest.mark.parametrize("kind", PLANS)
def test_stochastic_plans_are_the_same(kind: str) -> None:
    draws: dict[tuple, Tensor] = {}

    def normal(name: tuple) -> Tensor:
        draws.setdefault(name, torch.randn(3, 2, 2, 2, dtype=torch.float64))
        return draws[name]

    process = ForwardProcess(normal)
    ours, theirs = (run_plan(PLANS[kind], d, start(80.0), process) for d in (FLOW, mixture()))
    assert draws and ours.nfe == theirs.nfe and relative_error(ours.x, theirs.x) < 1e-10


@given(TIMES, TIMES, SHIFTS)
def test_a_jump_is_the_forward_process_of_the_flow(a: float, b: float, shift: float) -> None:
    """``y(s2) = (1 - s2) / (1 - s1) y(s1) + sqrt(s2^2 - ((1 - s2) s1 / (1 - s1))^2) z``."""
    low, high = sorted((a, b))
    if high - low < 1e-3:
        return
    flow = Flow(shift)
    sigma = flow.sigma(torch.tensor([low, high], dtype=torch.float64))
    s1, s2 = (sigma / (1 + sigma)).tolist()
    x, z = start(float(sigma[0])), start(1.0)
    lifted = ForwardProcess(lambda name: z).lift(x, float(sigma[0]), float(sigma[1]), ("jump",))
    y = flow.own_state(x, sigma[0])
    kept = (1 - s2) / (1 - s1)
    expected = kept * y + math.sqrt(max(0.0, s2**2 - (kept * s1) ** 2)) * z
    torch.testing.assert_close(flow.own_state(lifted, sigma[1]), expected, rtol=1e-6, atol=1e-9)


def test_the_state_may_be_of_any_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        out = VelocityDenoiser(lambda y, s: y * s)(start(2.0, dtype), torch.tensor(2.0))
        assert isinstance(out, Denoised) and out.x0.dtype == dtype and out.feat is None
