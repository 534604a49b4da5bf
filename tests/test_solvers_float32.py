"""Walks from sigma 20,000 in float32: where x and its change nearly cancel, no digits are lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from denoisers.analytic import MixtureDenoiser
from plans.plan import run_plan
from plans.stochastic import ddpm_plan
from solvers.driver import analytic_node, integrate
from solvers.registry import make_solver
from solvers.rules import FixedRatio
from solvers.types import Denoised, Solver
from tests.solver_problem import BATCH, SHAPE, WITH_GUIDE, mixture, start

HIGH = 20_000.0


@dataclass(frozen=True)
class Exact:
    """The mixture in float64, its answer rounded to the dtype of the state."""

    mixture: MixtureDenoiser
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(self.mixture(x.double(), sigma.double()).x0.to(x.dtype), None)


def cosine(nodes: int) -> Tensor:
    """Equal steps of a cosine schedule: the first leads from 20,000 to a level of a few units."""
    ts = torch.tan(torch.linspace(1, 0.02, nodes, dtype=torch.float64) * math.pi / 2).abs()
    ts[0] = HIGH
    return ts


def lost(solver: Solver, ts: Tensor, afs: bool) -> float:
    """What float32 states lose, relative to the largest value of each state."""
    guide = None if solver.guide or solver.max_order > 1 else FixedRatio(0.5)
    x = start(HIGH).float()
    exact = integrate(solver, Exact(mixture()), x.double(), ts, guide, afs).x
    found = integrate(solver, Exact(mixture()), x, ts, guide, afs).x
    assert found.dtype == torch.float32
    gaps = (found.double() - exact).abs().flatten(1).amax(1)
    return float((gaps / exact.abs().flatten(1).amax(1)).max())


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("name", WITH_GUIDE)
def test_no_digits_are_lost_in_the_first_steps(name: str, afs: bool) -> None:
    for nodes in (4, 6, 10):
        assert lost(WITH_GUIDE[name], cosine(nodes), afs) < 1e-5


def test_the_analytic_node_has_the_denoised_state_of_a_unit_gaussian() -> None:
    x = start(HIGH)
    for sigma in (HIGH, 80.0, 1.0, 0.01):
        t = torch.tensor(sigma, dtype=torch.float64)
        subtracted = x - t * x / torch.sqrt(1 + t**2)  # loses 8 of 16 digits at 20,000
        found = analytic_node(x.float(), t).x0
        assert float((found - subtracted).abs().max()) < 2e-6 * float(subtracted.abs().max())


class Velocity:
    """A network of v-prediction that is exact for the mixture, in float32 as networks are."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.double()

    def level(self, step: int) -> Tensor:
        """Sigma at an index step, 0-d."""
        kept = self.alphas_cumprod[step]
        return ((1 - kept) / kept).sqrt()

    def __call__(self, y: Tensor, sigma: Tensor) -> Tensor:
        """v = alpha n - s x0 for y = alpha x0 + s n."""
        alpha, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        x0 = mixture()(y.double() / alpha, sigma).x0
        return (alpha * (y.double() - alpha * x0) / s - s * x0).float()


@dataclass(frozen=True)
class VelocityDenoiser:
    """That network as a denoiser, around which everything is in the dtype of the state."""

    network: Velocity
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        from denoisers.families.diffusers.process import Prediction
        from denoisers.noise_schedules import DiscreteVP

        prediction = Prediction(DiscreteVP(self.network.alphas_cumprod), "v_prediction", None)
        level = sigma.to(x.dtype)
        raw = self.network(prediction.scale(x, level), sigma)
        return Denoised(prediction.x0(x, level, raw), None)


def draw(number: int) -> Tensor:
    return torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("steps", [4, 8, 25])
@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
def test_walks_are_those_of_ddim(steps: int, eta: float | None) -> None:
    """Euler (None) and the ancestral chain against its DDIM, every state, v-prediction, cosine."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    if eta:  # in float32 its 1 - alphas - variance, which is almost 0 here, has no correct digit
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    network = Velocity(scheduler.alphas_cumprod)
    levels = [network.level(int(step)) for step in scheduler.timesteps]
    assert levels[0] > HIGH
    ts = torch.stack([*levels, torch.zeros((), dtype=torch.float64)])
    y = draw(100) * float(levels[0] / (1 + levels[0] ** 2).sqrt())
    x = draw(100) * float(levels[0])
    if eta is None:
        states = integrate(make_solver("euler"), VelocityDenoiser(network), x, ts).x[1:]
    else:
        plan = ddpm_plan(ts, eta)
        walk = run_plan(plan, VelocityDenoiser(network), x, lambda name: draw(name[1]))
        states = walk.x[[*range(2, len(walk.x), 2), -1]] if eta else walk.x[1:]
    for number, (step, state) in enumerate(zip(scheduler.timesteps, states, strict=True)):
        options = {"eta": eta, "variance_noise": draw(number)} if eta else {}
        y = scheduler.step(network(y, ts[number]), step, y, **options).prev_sample
        found = state / float((1 + ts[number + 1] ** 2).sqrt())
        assert found.dtype == y.dtype == torch.float32
        assert float((found - y).abs().max()) < 1e-5 * float(y.abs().max())


def test_the_ancestral_chain_is_that_of_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        variance_type="fixed_small",
    )  # fmt: skip
    steps = list(range(999, -1, -111))
    scheduler.set_timesteps(timesteps=steps)
    network, drawn = Velocity(scheduler.alphas_cumprod), [0]
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: draw(drawn[-1]))
    ts = torch.stack([network.level(step) for step in steps])
    plan = ddpm_plan(ts)
    x = draw(100) * float(ts[0])
    ours = run_plan(plan, VelocityDenoiser(network), x, lambda name: draw(name[1])).x[2::2]
    y = draw(100) * float(ts[0] / (1 + ts[0] ** 2).sqrt())
    for number, state in enumerate(ours):
        drawn.append(number)
        y = scheduler.step(network(y, ts[number]), steps[number], y).prev_sample
        found = state / float((1 + ts[number + 1] ** 2).sqrt())
        assert float((found - y).abs().max()) < 1e-5 * float(y.abs().max())
