"""From options to a classic solver on a grid."""

from __future__ import annotations

from dataclasses import replace

from denoisers.cards import Card
from plans.plan import Plan, Solve
from runtime.errors import UserError
from samplers.builders.common import find_length
from samplers.options import TAKES, SamplerOptions
from samplers.sampler import Sampler
from solvers.registry import SOLVERS


def classic_sampler(options: SamplerOptions, card: Card) -> Sampler:
    """The walk of a classic solver; UserError or ValueError for options that make none."""
    name = str(options.sampler)
    solver = options.solver_options.make(name)
    afs = bool(options.afs)
    grid = options.grid.resolve(card)

    def make(num_steps: int) -> Plan:
        if afs and num_steps < 3:
            raise UserError(
                f"--afs makes the first of {num_steps - 1} interval(s) analytic: "
                "give --num_steps 3 or more"
            )
        return (Solve(solver, grid.nodes(num_steps), None, afs),)

    num_steps, plan = find_length(options, card, make)
    own = {key: getattr(solver, key) for key in SOLVERS[name].options - {"r"}}
    if "r" in TAKES[name]:
        own["r"] = 0.5 if options.r is None else options.r
    options = replace(options.on(grid, num_steps), afs=afs, **own)
    order = str(solver.max_order) if "max_order" in TAKES[name] else ""
    label = f"{name}{order}{'-afs' if afs else ''}"
    return Sampler(label, plan, options, card.cost(options.guidance_rate))
