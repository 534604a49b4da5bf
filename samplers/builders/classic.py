"""The builder of classic solvers."""

from __future__ import annotations

from dataclasses import replace

from denoisers.cards import Card
from plans.plan import Plan, Solve
from runtime.errors import UserError
from samplers.builders.common import resolve_length
from samplers.options import ACCEPTS, SamplerOptions
from samplers.sampler import Sampler
from solvers.registry import SOLVERS


def classic_sampler(options: SamplerOptions, card: Card) -> Sampler:
    """A classic solver on a grid; UserError or ValueError for invalid options."""
    name = str(options.sampler)
    solver = options.solver_options.make(name)
    afs = bool(options.afs)
    schedule = options.schedule_type or card.default_schedule
    given = options if options.times else replace(options, schedule_type=schedule)
    grid = given.grid.resolve(card)

    def make(num_steps: int) -> Plan:
        if afs and num_steps < 3:
            raise UserError(
                f"--afs makes the first of {num_steps - 1} interval(s) analytic: "
                "give --num_steps 3 or more"
            )
        return (Solve(solver, grid.nodes(num_steps), None, afs),)

    num_steps, plan = resolve_length(options, card, make)
    resolved = {key: getattr(solver, key) for key in SOLVERS[name].options - {"r"}}
    if "r" in ACCEPTS[name]:
        resolved["r"] = 0.5 if options.r is None else options.r
    options = replace(options.with_grid(grid, num_steps), afs=afs, **resolved)
    order = str(solver.max_order) if "max_order" in ACCEPTS[name] else ""
    label = f"{name}{order}{'-afs' if afs else ''}"
    return Sampler(label, plan, options, card.cost(options.guidance_rate))
