"""The number of nodes of a sampler: given, or computed from the NFE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from denoisers.cards import Card
from plans.plan import Plan, plan_nfe
from runtime.errors import UserError
from samplers.options import SamplerOptions
from solvers.registry import CLASSIC

PER_NODE = 4  #: calls that a node adds to a walk: one, and one for each that a solver inserts
#: Default number of nodes without ``num_steps`` and ``nfe`` (AMED's and EDM's defaults).
DEFAULT_STEPS = {**dict.fromkeys(CLASSIC, 6), "ddpm": 18, "edm": 18, "restart": 18}


def resolve_length(
    options: SamplerOptions, card: Card, make: Callable[[int], Plan], stated: int | None = None
) -> tuple[int, Plan]:
    """The number of main nodes, given or computed from the NFE, and the plan with it.

    ``stated`` is the number of main nodes in ``--restart_info``, if any.
    """
    if options.times is not None:
        given = len(options.times)
        if stated not in (None, given):
            raise UserError(
                f"--times has {given} noise levels, but --restart_info has {stated} main nodes: "
                "leave that number out"
            )
        stated = given
    if options.nfe is None:
        num_steps = options.num_steps
        if None not in (num_steps, stated) and num_steps != stated:
            raise UserError(
                f"--num_steps {num_steps} contradicts the {stated} main nodes in --restart_info: "
                "give one of them"
            )
        num_steps = num_steps or stated or DEFAULT_STEPS[str(options.sampler)]
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
    """The length whose plan has exactly the NFE ``budget``; the NFE increases with the length.

    Lengths that are certainly too short are passed over: a node more costs `PER_NODE` calls at
    most.
    """
    costs: list[int] = []
    problem: ValueError | None = None
    at = 0
    while at < len(lengths):
        num_steps = lengths[at]
        at += 1
        try:
            plan = make(num_steps)
        except ValueError as error:  # for example too short for its restart intervals
            problem = error
            continue
        costs.append(plan_nfe(plan, cost))
        at += max(0, (budget - costs[-1]) // (PER_NODE * cost) - 1)
        if costs[-1] == budget:
            return num_steps, plan
        if costs[-1] > budget:
            break
    if not costs and problem is not None:
        raise problem
    near = " or ".join(str(nfe) for nfe in costs[-2:] if nfe)
    raise UserError(f"{options.sampler} cannot use exactly {budget} NFE: give {near}")
