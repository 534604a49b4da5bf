"""The builder of Restart."""

from __future__ import annotations

from dataclasses import asdict, replace

from denoisers.cards import Card
from plans.plan import Plan
from plans.walk import WalkSpec
from restart.build import restart_plan
from restart.intervals import interval_json, resolve_intervals
from restart.tables import configuration
from runtime.errors import UserError
from samplers.builders.common import resolve_length
from samplers.options import CONFIG_ACCEPTS, SamplerOptions, check_accepted
from samplers.sampler import Sampler
from solvers.grids import DEFAULT_RHO
from solvers.registry import CLASSIC


def restart_sampler(
    options: SamplerOptions,
    card: Card,
    main: WalkSpec | None = None,
    descent: WalkSpec | None = None,
) -> Sampler:
    """Restart with the intervals of ``options``.

    ``main`` and ``descent`` replace the solvers of the options.  The main grid ends with 0 by
    default.  Descents have polynomial grids, with the exponent of a polynomial main grid.  Raises
    UserError or ValueError, one sentence with the remedy.
    """
    config = options.restart_config
    if config is not None:
        options = _with_configuration(options, config)
    afs, zero = bool(options.afs), options.final_zero is not False
    main = replace(main or _classic(options.main_solver), afs=afs)
    descent = descent or _classic(options.restart_solver)
    grid, churn, gamma = options.grid.resolve(card), options.churn, options.restart_gamma or 0.0
    polynomial = grid.schedule_type == "polynomial"
    rho = (grid.rho if polynomial else None) or DEFAULT_RHO["polynomial"] or 0.0
    stated, intervals = resolve_intervals(options.restart_info, card)

    def make(num_steps: int) -> Plan:
        ts = grid.closed(num_steps) if zero else grid.nodes(num_steps)
        return restart_plan(ts, intervals, main, descent, churn=churn, restart_gamma=gamma, rho=rho)

    num_steps, plan = resolve_length(options, card, make, stated)
    options = replace(
        options.with_grid(grid, num_steps),
        afs=afs,
        final_zero=zero,
        main_solver=main.name,
        restart_solver=descent.name,
        restart_info=interval_json(intervals),
        restart_gamma=gamma,
        **asdict(churn),
    )
    label = "restart" if config is None else f"restart-{config}"
    return Sampler(label, plan, options, card.cost(options.guidance_rate))


def _with_configuration(options: SamplerOptions, name: str) -> SamplerOptions:
    """The options with those of a published configuration; only the solvers may differ from it."""
    what = f"restart configuration {name!r}, which is complete"
    check_accepted(options, CONFIG_ACCEPTS, what, "use --restart_info instead")
    published = configuration(name)
    return replace(
        options,
        num_steps=published.n_main,
        restart_info=interval_json(published.intervals),
        main_solver=options.main_solver or published.main_solver,
        schedule_type=published.schedule_type,
        restart_gamma=published.restart_gamma,
        S_min=published.S_min,
        S_max=published.S_max,
        S_noise=published.S_noise,
    )


def _classic(name: str | None) -> WalkSpec:
    name = name or "heun"
    if name not in CLASSIC:
        raise UserError(f"solver {name!r} cannot be used in restart; choose {', '.join(CLASSIC)}")
    return WalkSpec.by(name)
