"""Walks by length: the number of nodes as it is given, or found from a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from denoisers.cards import Card
from plans.plan import Plan, plan_nfe
from runtime.errors import UserError
from samplers.options import SamplerOptions
from solvers.registry import CLASSIC

#: Nodes of the grid where neither ``num_steps`` nor ``nfe`` is given (AMED's and EDM's defaults).
DEFAULT_STEPS = {**dict.fromkeys(CLASSIC, 6), "ddpm": 18, "edm": 18, "restart": 18}


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
    lengths = range(2, options.nfe + 3) if stated is None else (stated,)
    return _fit(options, options.nfe, card.cost(options.guidance_rate), make, lengths)


def _fit(
    options: SamplerOptions,
    budget: int,
    cost: int,
    make: Callable[[int], Plan],
    lengths: Sequence[int],
) -> tuple[int, Plan]:
    """The length whose plan spends exactly the budget; NFE grows with the length."""
    spent: list[int] = []
    problem: ValueError | None = None
    for num_steps in lengths:
        try:
            plan = make(num_steps)
        except ValueError as error:  # too short for its restart intervals, say
            problem = error
            continue
        spent.append(plan_nfe(plan, cost))
        if spent[-1] == budget:
            return num_steps, plan
        if spent[-1] > budget:
            break
    if not spent and problem is not None:
        raise problem
    near = " or ".join(str(nfe) for nfe in spent[-2:] if nfe)
    raise UserError(f"no walk of {options.sampler} spends exactly {budget} NFE: give {near}")
