"""From options, or from a predictor, to a sampler."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch

from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from denoisers.cards import Card
from restart.build import edm_plan, restart_plan
from restart.intervals import Interval, parse_restart_line
from restart.plan import Plan, Solve, plan_nfe, with_kernel
from restart.tables import configuration, published_grid
from runtime.errors import UserError
from runtime.record import RunRecord
from samplers.build_pds import pds_sampler
from samplers.options import (
    CLASSIC,
    CONFIG_TAKES,
    LEARNED_TAKES,
    SAMPLERS,
    TAKES,
    SamplerOptions,
    check_taken,
)
from samplers.sampler import Sampler
from solvers.grids import get_grid
from solvers.registry import NEEDS_GUIDE, SOLVERS, make_solver
from solvers.types import Solver

#: Nodes of the grid where neither ``num_steps`` nor ``nfe`` is given (AMED's and EDM's defaults).
DEFAULT_STEPS = {**dict.fromkeys(CLASSIC, 6), "edm": 18, "restart": 18}
RHO = {"polynomial": 7.0, "time_uniform": 1.0, "discrete": 1.0, "logsnr": None}


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
    if options.num_steps is not None and options.nfe is not None:
        raise UserError(
            f"--num_steps {options.num_steps} and --nfe {options.nfe} both fix the length of the "
            "walk: give one of them"
        )
    low = card.sigma_min if options.sigma_min is None else options.sigma_min
    high = card.sigma_max if options.sigma_max is None else options.sigma_max
    if name == "edm":
        return _edm(options, card, low, high)
    if name == "restart":
        return _restart(options, card, low, high)
    if name == "pds":
        return pds_sampler(options, card, low, high)
    return _classic(options, card, low, high)


def build_learned(
    options: SamplerOptions,
    predictor: AMEDPredictor,
    student: StudentSettings,
    record: RunRecord,
    name: str,
    card: Card,
) -> Sampler:
    """The sampler of a trained predictor; ``name`` is that of its folder or file.

    The predictor stays in its dtype and on its device, so move it first.  Raises UserError where
    an option contradicts what the predictor brings along.
    """
    if options.sampler is not None:
        raise UserError(
            f"--sampler {options.sampler} and --predictor_path {name} are two samplers: give one"
        )
    check_taken(options, LEARNED_TAKES, "a predictor, which brings its own solver and grid")
    if card.name != student.dataset_name:
        raise UserError(
            f"predictor {name} was trained for {student.dataset_name!r}, not for {card.name!r}: "
            "leave --dataset_name out, or train one for it"
        )
    rate = student.guidance_rate if options.guidance_rate is None else options.guidance_rate
    settings = {
        "predictor": name,
        "predictor_sha256": _sha256(predictor),
        "predictor_record": {"created": record.created, "model": record.model},
        **student.to_options(),
    }
    settings.pop("guidance_rate")
    grid = student.grid(**card.time_maps)
    plan = (Solve(student.solver(), grid, predictor, student.afs),)
    return Sampler(_label(student, name), plan, settings, card.cost(rate), rate)


def _label(student: StudentSettings, name: str) -> str:
    """``amed-00001`` for a numbered run, ``amed-<name>`` for another."""
    folder, _, snapshot = name.partition("/")
    short = folder.split("-")[0] if folder[:5].isdigit() else folder
    return "-".join(part for part in (student.sampler_stu, short, snapshot) if part)


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
    schedule = options.schedule_type or "polynomial"
    rho = RHO.get(schedule) if options.schedule_rho is None else options.schedule_rho
    afs = bool(options.afs)

    def make(num_steps: int) -> Plan:
        if afs and num_steps < 3:
            raise UserError(
                f"--afs makes the first of {num_steps - 1} interval(s) analytic: "
                "give --num_steps 3 or more"
            )
        grid = get_grid(schedule, num_steps, low, high, rho, **card.time_maps)
        return (Solve(solver, grid, None, afs),)

    num_steps, plan = _length(options, card, make)
    settings = {"num_steps": num_steps, "afs": afs, "schedule_type": schedule}
    settings |= {"schedule_rho": rho, "sigma_min": low, "sigma_max": high}
    settings |= _solver_settings(name, solver, options)
    order = str(solver.max_order) if "max_order" in TAKES[name] else ""
    return _sampler(options, card, f"{name}{order}{'-afs' if afs else ''}", plan, settings)


def _solver_settings(name: str, solver: Solver, options: SamplerOptions) -> dict[str, Any]:
    asked = ("max_order", "predict_x0", "lower_order_final", "thresholding")
    settings = {key: getattr(solver, key) for key in asked if key in TAKES[name]}
    if "r" in TAKES[name]:
        settings["r"] = 0.5 if options.r is None else options.r
    return settings


def _edm(options: SamplerOptions, card: Card, low: float, high: float) -> Sampler:
    rho = 7.0 if options.schedule_rho is None else options.schedule_rho
    noise = _noise(options)
    num_steps, plan = _length(
        options, card, lambda n: edm_plan(published_grid(n, low, high, rho), **noise)
    )
    label = f"edm-churn{noise['S_churn']:g}" if noise["S_churn"] else "edm"
    settings = {"num_steps": num_steps, "schedule_rho": rho, "sigma_min": low, "sigma_max": high}
    return _sampler(options, card, label, plan, settings | _finite(noise))


def _restart(options: SamplerOptions, card: Card, low: float, high: float) -> Sampler:
    rho = 7.0 if options.schedule_rho is None else options.schedule_rho
    main, down = (options.main_solver or "heun"), (options.restart_solver or "heun")
    walkers = (_walker(main), _walker(down))
    settings: dict[str, Any] = {"main_solver": main, "restart_solver": down, "schedule_rho": rho}
    settings |= {"sigma_min": low, "sigma_max": high}
    if options.restart_config is not None:
        what = f"restart configuration {options.restart_config!r}, which is complete"
        check_taken(options, CONFIG_TAKES, what, "use --restart_info instead")
        known = configuration(options.restart_config)
        plan = known.plan(low, high, rho, *walkers)
        settings |= {"restart_config": known.name, "num_steps": known.n_main}
        return _sampler(options, card, f"restart-{known.name}", plan, settings)
    stated, intervals = parse_restart_line(_restart_info(options, card))
    gamma = options.restart_gamma or 0.0
    noise = _noise(options)

    def make(num_steps: int) -> Plan:
        grid = published_grid(num_steps, low, high, rho)
        return restart_plan(grid, intervals, *walkers, restart_gamma=gamma, rho=rho, **noise)

    num_steps, plan = _length(options, card, make, stated)
    settings |= {"num_steps": num_steps, "restart_info": _info(intervals), "restart_gamma": gamma}
    return _sampler(options, card, "restart", plan, settings | _finite(noise))


def _walker(name: str) -> Solver:
    if name not in SOLVERS or name in NEEDS_GUIDE:
        raise UserError(f"no solver {name!r} walks a restart grid; choose {', '.join(CLASSIC)}")
    return make_solver(name)


def _restart_info(options: SamplerOptions, card: Card) -> str:
    if options.restart_info is not None:
        return options.restart_info
    if not card.restart_info:
        raise UserError(
            f"{card.name!r} has no restart intervals of its own: give --restart_info "
            '{"0": [N_restart, K, t_min, t_max]}, or --restart_config'
        )
    return json.dumps(dict(card.restart_info))


def _info(intervals: tuple[Interval, ...]) -> dict[str, list[float]]:
    return {str(n): [i.n_restart, i.k, i.t_min, i.t_max] for n, i in enumerate(intervals)}


def _length(
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


def _sampler(
    options: SamplerOptions, card: Card, label: str, plan: Plan, settings: dict[str, Any]
) -> Sampler:
    rate = options.guidance_rate
    settings = {"sampler": options.sampler, **settings}
    plan = with_kernel(plan, card.pfgmpp)
    return Sampler(label, plan, settings, card.cost(rate), rate)


class _Noise(TypedDict):
    S_churn: float
    S_min: float
    S_max: float
    S_noise: float


def _noise(options: SamplerOptions) -> _Noise:
    def pick(value: float | None, default: float) -> float:
        return default if value is None else value

    return {
        "S_churn": pick(options.S_churn, 0.0),
        "S_min": pick(options.S_min, 0.0),
        "S_max": pick(options.S_max, math.inf),
        "S_noise": pick(options.S_noise, 1.0),
    }


def _finite(noise: _Noise) -> dict[str, Any]:
    """JSON has no infinity: no upper limit is null."""
    return {**noise, "S_max": None if math.isinf(noise["S_max"]) else noise["S_max"]}


def _sha256(predictor: torch.nn.Module) -> str:
    """Of the weights alone: the same for the same predictor under another name or dtype."""
    digest = hashlib.sha256()
    for key, value in sorted(predictor.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
