"""From options to Restart."""

from __future__ import annotations

from dataclasses import asdict, replace

from denoisers.cards import Card
from plans.plan import Plan
from plans.walk import WalkSpec
from restart.build import restart_plan
from restart.intervals import interval_json, resolve_intervals
from restart.tables import Configuration, configuration
from runtime.errors import UserError
from samplers.builders.common import find_length
from samplers.options import CONFIG_TAKES, SamplerOptions, check_taken
from samplers.sampler import Sampler
from solvers.grids import DEFAULT_RHO
from solvers.registry import CLASSIC


def restart_sampler(
    options: SamplerOptions,
    card: Card,
    main: WalkSpec | None = None,
    descent: WalkSpec | None = None,
) -> Sampler:
    """Restart with the intervals that ``options`` give.

    ``main`` and ``descent`` replace the options' solvers.  The main walk is down the schedule of
    the options and then to 0, unless they say otherwise.  Descents are polynomial, with the
    exponent of a polynomial main walk.  Raises UserError or ValueError, one sentence with the
    remedy.
    """
    if options.restart_config is not None:
        what = f"restart configuration {options.restart_config!r}, which is complete"
        check_taken(options, CONFIG_TAKES, what, "use --restart_info instead")
        options = _with_configuration(options, configuration(options.restart_config))
    afs, zero = bool(options.afs), options.final_zero is not False
    main = replace(main or _classic(options.main_solver), afs=afs)
    descent = descent or _classic(options.restart_solver)
    grid, churn, gamma = options.grid.resolve(card), options.churn, options.restart_gamma or 0.0
    polynomial = grid.schedule_type == "polynomial"
    rho = (grid.rho if polynomial else None) or DEFAULT_RHO["polynomial"] or 0.0
    stated, intervals = resolve_intervals(options.restart_info, card)

    def make(num_steps: int) -> Plan:
        nodes = grid.closed(num_steps) if zero else grid.nodes(num_steps)
        return restart_plan(
            nodes, intervals, main, descent, churn=churn, restart_gamma=gamma, rho=rho
        )

    num_steps, plan = find_length(options, card, make, stated)
    options = replace(
        options.on(grid, num_steps),
        afs=afs,
        final_zero=zero,
        main_solver=main.name,
        restart_solver=descent.name,
        restart_info=interval_json(intervals),
        restart_gamma=gamma,
        **asdict(churn),
    )
    config = options.restart_config
    label = "restart" if config is None else f"restart-{config}"
    return Sampler(label, plan, options, card.cost(options.guidance_rate))


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


def _classic(name: str | None) -> WalkSpec:
    name = name or "heun"
    if name not in CLASSIC:
        raise UserError(f"no solver {name!r} walks a restart grid; choose {', '.join(CLASSIC)}")
    return WalkSpec.by(name)
