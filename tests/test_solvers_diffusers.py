"""UniPC and DEIS against the schedulers of ``diffusers``: the same grid, denoiser and start.

Their process is variance-preserving with ``alpha = 1 / sqrt(1 + sigma^2)``, so a state of theirs is
``alpha`` times ours.  Their grid is replaced by ours, which ends at a positive sigma; whatever a
scheduler does at a final 0 of its own (``final_sigmas_type``) is compared for UniPC alone, because
DEIS is undefined there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from solvers.driver import integrate
from solvers.multistep import DEIS
from solvers.types import Solver
from solvers.unipc import UniPC
from tests.solver_problem import grid, mixture, relative_error, start

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers


def alpha(sigma: Tensor) -> Tensor:
    return 1 / torch.sqrt(1 + sigma**2)


def walked(scheduler: Any, ts: Tensor) -> Tensor:
    """The states that a scheduler visits on the grid ``ts``, as states of our process."""
    denoiser, steps = mixture(), len(ts) - 1
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps = ts, torch.arange(steps, 0, -1)
    scheduler.set_begin_index(0)
    states = [start()]
    for time, sigma, sigma_next in zip(scheduler.timesteps, ts, ts[1:], strict=False):
        noise = (states[-1] - denoiser(states[-1], sigma).x0) / sigma
        step = scheduler.step(noise, time, alpha(sigma) * states[-1])
        states.append(step.prev_sample / alpha(sigma_next))
    return torch.stack(states)


def assert_same_walk(scheduler: Any, solver: Solver, ts: Tensor) -> None:
    theirs = walked(scheduler, ts)
    ours = integrate(solver, mixture(), start(), ts).x
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(a, b) < 1e-10, f"state {i}"


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("taper", [False, True])
@pytest.mark.parametrize("steps", [6, 12])
def test_unipc(order: int, variant: str, taper: bool, steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, lower_order_final=taper
    )
    assert_same_walk(scheduler, UniPC(order, taper, variant), grid(steps + 1))


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_to_zero(order: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(solver_order=order)
    assert_same_walk(scheduler, UniPC(order), grid(6, zero=True))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("taper", [False, True])
@pytest.mark.parametrize("steps", [6, 12])
def test_deis(order: int, taper: bool, steps: int) -> None:
    from diffusers import DEISMultistepScheduler

    scheduler = DEISMultistepScheduler(
        solver_order=order, algorithm_type="deis", solver_type="logrho", lower_order_final=taper
    )
    assert_same_walk(scheduler, DEIS(order, taper), grid(steps + 1))
