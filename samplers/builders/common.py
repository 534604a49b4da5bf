"""What the builders of samplers share: grids by options, lengths by budget, records."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from denoisers.cards import Card
from plans.plan import Plan, plan_nfe, with_kernel
from runtime.errors import UserError
from samplers.options import CLASSIC, SamplerOptions
from samplers.sampler import Sampler
from solvers.grids import get_grid

#: Nodes of the grid where neither ``num_steps`` nor ``nfe`` is given (AMED's and EDM's defaults).
DEFAULT_STEPS = {**dict.fromkeys(CLASSIC, 6), "ddpm": 18, "edm": 18, "restart": 18}
POLYNOMIAL_RHO = 7.0
RHO = {"polynomial": POLYNOMIAL_RHO, "time_uniform": 1.0, "discrete": 1.0, "logsnr": None}


def schedule_of(options: SamplerOptions) -> tuple[str, float | None]:
    """The schedule of the (main) grid and its exponent."""
    schedule = options.schedule_type or "polynomial"
    return schedule, RHO.get(schedule) if options.schedule_rho is None else options.schedule_rho


def closed_grid(options: SamplerOptions, card: Card, low: float, high: float, n: int) -> Tensor:
    """``n`` nodes of the schedule, then 0."""
    schedule, rho = schedule_of(options)
    nodes = get_grid(schedule, n, low, high, rho, **card.time_maps)
    return torch.cat([nodes, nodes.new_zeros(1)])


def find_length(
    options: SamplerOptions, card: Card, make: Callable[[int], Plan], stated: int | None = None
) -> tuple[int, Plan]:
    """The number of main nodes, given or found from the budget, and the plan it makes."""
    if options.nfe is None:
        asked = options.num_steps
        if None not in (asked, stated) and asked != stated:
            raise UserError(
                f"--num_steps {asked} contradicts the {stated} main nodes that --restart_info "
                "states: give one of them"
            )
        num_steps = asked or stated or DEFAULT_STEPS[str(options.sampler)]
        return num_steps, make(num_steps)
    return _fit(options, card, make, range(2, options.nfe + 3) if stated is None else (stated,))


def _fit(
    options: SamplerOptions,
    card: Card,
    make: Callable[[int], Plan],
    lengths: range | tuple[int, ...],
) -> tuple[int, Plan]:
    """The length whose plan spends exactly the budget; NFE grows with the length."""
    cost = card.cost(options.guidance_rate)
    found: list[int] = []
    problem: ValueError | None = None
    for num_steps in lengths:
        try:
            plan = make(num_steps)
        except ValueError as error:  # too short for its restart intervals, say
            problem = error
            continue
        found.append(plan_nfe(plan, cost))
        if found[-1] == options.nfe:
            return num_steps, plan
        if found[-1] > (options.nfe or 0):
            break
    if not found and problem is not None:
        raise problem
    near = " or ".join(str(nfe) for nfe in found[-2:] if nfe)
    raise UserError(f"no walk of {options.sampler} spends exactly {options.nfe} NFE: give {near}")


def make_sampler(
    options: SamplerOptions, card: Card, label: str, plan: Plan, settings: dict[str, Any]
) -> Sampler:
    """``plan`` with the jumps of the model's kernel and the price of its calls."""
    rate = options.guidance_rate
    settings = {"sampler": options.sampler, **settings}
    plan = with_kernel(plan, card.pfgmpp)
    return Sampler(label, plan, settings, card.cost(rate), rate)


class _Noise(TypedDict):
    S_churn: float
    S_min: float
    S_max: float
    S_noise: float


def noise_of(options: SamplerOptions) -> _Noise:
    """The settings of EDM's stochastic sampler; without any, its deterministic one."""

    def pick(value: float | None, default: float) -> float:
        return default if value is None else value

    return {
        "S_churn": pick(options.S_churn, 0.0),
        "S_min": pick(options.S_min, 0.0),
        "S_max": pick(options.S_max, math.inf),
        "S_noise": pick(options.S_noise, 1.0),
    }


def finite(noise: _Noise) -> dict[str, Any]:
    """JSON has no infinity: no upper limit is null."""
    return {**noise, "S_max": None if math.isinf(noise["S_max"]) else noise["S_max"]}
