"""From options to a sampler."""

from __future__ import annotations

from typing import Any

from denoisers.cards import Card
from plans.plan import Plan, Solve
from restart.build import ddpm_plan, edm_plan
from runtime.errors import UserError
from samplers.builders.common import (
    closed_grid,
    find_length,
    finite,
    make_sampler,
    noise_of,
    schedule_of,
)
from samplers.builders.pds import pds_sampler
from samplers.builders.restart import restart_sampler
from samplers.options import SAMPLERS, TAKES, SamplerOptions, check_length, check_taken
from samplers.sampler import Sampler
from solvers.grids import get_grid
from solvers.registry import NEEDS_GUIDE, make_solver
from solvers.types import Solver


def build(options: SamplerOptions, card: Card) -> Sampler:
    """The sampler that ``options`` name, on the noise levels of ``card``'s model.

    Raises UserError or ValueError, one sentence with the remedy, for options that make no sampler.
    """
    name = options.sampler
    if name in NEEDS_GUIDE:
        raise UserError(
            f"sampler {name!r} is nothing without a learned predictor: train one with train.py "
            "and give --predictor_path instead of --sampler"
        )
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    check_taken(options, TAKES[name], f"sampler {name!r}")
    check_length(options)
    low = card.sigma_min if options.sigma_min is None else options.sigma_min
    high = card.sigma_max if options.sigma_max is None else options.sigma_max
    if name == "ddpm":
        return _ddpm(options, card, low, high)
    if name == "edm":
        return _edm(options, card, low, high)
    if name == "restart":
        return restart_sampler(options, card, low, high)
    if name == "pds":
        return pds_sampler(options, card, low, high)
    return _classic(options, card, low, high)


def _classic(options: SamplerOptions, card: Card, low: float, high: float) -> Sampler:
    name = str(options.sampler)
    solver = make_solver(
        name,
        max_order=options.max_order,
        predict_x0=options.predict_x0,
        lower_order_final=options.lower_order_final,
        thresholding=options.thresholding,
        r=options.r,
    )
    schedule, rho = schedule_of(options)
    afs = bool(options.afs)

    def make(num_steps: int) -> Plan:
        if afs and num_steps < 3:
            raise UserError(
                f"--afs makes the first of {num_steps - 1} interval(s) analytic: "
                "give --num_steps 3 or more"
            )
        grid = get_grid(schedule, num_steps, low, high, rho, **card.time_maps)
        return (Solve(solver, grid, None, afs),)

    num_steps, plan = find_length(options, card, make)
    settings = {"num_steps": num_steps, "afs": afs, "schedule_type": schedule}
    settings |= {"schedule_rho": rho, "sigma_min": low, "sigma_max": high}
    settings |= _solver_settings(name, solver, options)
    order = str(solver.max_order) if "max_order" in TAKES[name] else ""
    return make_sampler(options, card, f"{name}{order}{'-afs' if afs else ''}", plan, settings)


def _solver_settings(name: str, solver: Solver, options: SamplerOptions) -> dict[str, Any]:
    asked = ("max_order", "predict_x0", "lower_order_final", "thresholding")
    settings = {key: getattr(solver, key) for key in asked if key in TAKES[name]}
    if "r" in TAKES[name]:
        settings["r"] = 0.5 if options.r is None else options.r
    return settings


def _ddpm(options: SamplerOptions, card: Card, low: float, high: float) -> Sampler:
    eta = 1.0 if options.eta is None else options.eta
    num_steps, plan = find_length(
        options, card, lambda n: ddpm_plan(closed_grid(options, card, low, high, n), eta)
    )
    schedule, rho = schedule_of(options)
    settings = {"num_steps": num_steps, "schedule_type": schedule, "schedule_rho": rho}
    settings |= {"sigma_min": low, "sigma_max": high, "eta": eta}
    label = "ddpm" if eta == 1 else f"ddpm-eta{eta:g}"
    return make_sampler(options, card, label, plan, settings)


def _edm(options: SamplerOptions, card: Card, low: float, high: float) -> Sampler:
    noise = noise_of(options)
    num_steps, plan = find_length(
        options, card, lambda n: edm_plan(closed_grid(options, card, low, high, n), **noise)
    )
    label = f"edm-churn{noise['S_churn']:g}" if noise["S_churn"] else "edm"
    settings = {"num_steps": num_steps, "schedule_rho": schedule_of(options)[1]}
    settings |= {"sigma_min": low, "sigma_max": high}
    return make_sampler(options, card, label, plan, settings | finite(noise))
