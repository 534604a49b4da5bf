"""From options to Restart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from denoisers.cards import Card
from plans.plan import Plan
from restart.build import restart_plan
from restart.intervals import Interval, parse_restart_line
from restart.tables import Configuration, configuration
from runtime.errors import UserError
from samplers.builders.common import (
    POLYNOMIAL_RHO,
    closed_grid,
    find_length,
    finite,
    make_sampler,
    noise_of,
    schedule_of,
)
from samplers.options import CLASSIC, CONFIG_TAKES, SamplerOptions, check_taken
from samplers.sampler import Sampler
from solvers.registry import NEEDS_GUIDE, SOLVERS, make_solver
from solvers.types import Guide, Solver


class Walker(NamedTuple):
    """What walks a grid, under its name."""

    name: str
    solver: Solver
    guide: Guide | None = None


def restart_sampler(
    options: SamplerOptions,
    card: Card,
    low: float,
    high: float,
    main: Walker | None = None,
    down: Walker | None = None,
) -> Sampler:
    """Restart with the intervals that ``options`` give, on noise levels from ``high`` to ``low``.

    ``main`` and ``down`` walk where the options' solvers would.  The main walk is down the schedule
    of the options and then to 0, unless they say otherwise.  Descents are polynomial, with the
    exponent of a polynomial main walk.  Raises UserError or ValueError, one sentence with the
    remedy.
    """
    if options.restart_config is not None:
        what = f"restart configuration {options.restart_config!r}, which is complete"
        check_taken(options, CONFIG_TAKES, what, "use --restart_info instead")
        options = _with_configuration(options, configuration(options.restart_config))
    schedule, rho = schedule_of(options)
    inner_rho = rho if schedule == "polynomial" and rho is not None else POLYNOMIAL_RHO
    main = main or _walker(options.main_solver)
    down = down or _walker(options.restart_solver)
    settings: dict[str, Any] = {"main_solver": main.name, "restart_solver": down.name}
    settings |= {"schedule_type": schedule, "schedule_rho": rho}
    settings |= {"sigma_min": low, "sigma_max": high}
    stated, intervals = parse_restart_line(restart_info(options, card))
    gamma, noise = options.restart_gamma or 0.0, noise_of(options)
    afs, zero = bool(options.afs), options.final_zero is not False

    def make(num_steps: int) -> Plan:
        grid = closed_grid(options, card, low, high, num_steps)
        return restart_plan(
            grid if zero else grid[:-1],
            intervals,
            main.solver,
            down.solver,
            main_guide=main.guide,
            restart_guide=down.guide,
            afs=afs,
            restart_gamma=gamma,
            rho=inner_rho,
            **noise,
        )

    num_steps, plan = find_length(options, card, make, stated)
    settings |= {"num_steps": num_steps, "afs": afs, "final_zero": zero}
    settings |= {"restart_info": _info(intervals), "restart_gamma": gamma}
    settings |= finite(noise)
    if options.restart_config is None:
        return make_sampler(options, card, "restart", plan, settings)
    settings["restart_config"] = options.restart_config
    return make_sampler(options, card, f"restart-{options.restart_config}", plan, settings)


def _with_configuration(options: SamplerOptions, known: Configuration) -> SamplerOptions:
    """The published walk in full; other solvers may be asked for."""
    return replace(
        options,
        num_steps=known.n_main,
        restart_info=interval_json(known.intervals),
        main_solver=options.main_solver or known.main_solver,
        schedule_type=known.schedule_type,
        restart_gamma=known.restart_gamma,
        S_min=known.S_min,
        S_max=known.S_max,
        S_noise=known.S_noise,
    )


def restart_info(options: SamplerOptions, card: Card) -> str:
    """The intervals as text: those of the options, or the model's own."""
    if options.restart_info is not None:
        return options.restart_info
    if not card.restart_info:
        raise UserError(
            f"{card.name!r} has no restart intervals of its own: give --restart_info "
            '{"0": [N_restart, K, t_min, t_max]}, or --restart_config'
        )
    return json.dumps(dict(card.restart_info))


def _walker(name: str | None) -> Walker:
    name = name or "heun"
    if name not in SOLVERS or name in NEEDS_GUIDE:
        raise UserError(f"no solver {name!r} walks a restart grid; choose {', '.join(CLASSIC)}")
    return Walker(name, make_solver(name))


def interval_json(intervals: Sequence[Interval]) -> str:
    """The text that is read as these intervals."""
    return json.dumps(_info(intervals))


def _info(intervals: Sequence[Interval]) -> dict[str, list[float]]:
    return {str(n): [i.n_restart, i.k, i.t_min, i.t_max] for n, i in enumerate(intervals)}
