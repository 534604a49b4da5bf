"""FID against NFE in whole series: ODE, SDE and Restart, as in figure 3 of arXiv:2306.14878.

A sweep is a comparison with rows of its own: harness, files, resuming and report are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison.job import ComparisonJob, check_blocks, make_record, numbers, open_harness
from comparison.rows import Row
from denoisers.cards import Card
from metrics.detectors import Detector
from restart.intervals import read_configurations
from restart.tables import configurations
from runtime.dist import World
from runtime.errors import UserError
from samplers.build import build
from samplers.builders.restart import interval_json
from samplers.options import SamplerOptions

#: S_churn, S_min, S_max and S_noise that EDM's stochastic sampler is published with
#: (arXiv:2206.00364, table 5), by data set and model.
CHURN = {
    "cifar10-vp": (30.0, 0.01, 1.0, 1.007),
    "cifar10-ve": (80.0, 0.05, 1.0, 1.007),
    "imagenet64-adm": (80.0, 0.05, 50.0, 1.003),
    "imagenet64-edm": (40.0, 0.05, 50.0, 1.003),
}


def prepare(options: dict[str, Any], world: World, detector: Detector) -> ComparisonJob:
    """Load everything and lay out the series.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    harness = open_harness(options, world, detector, check_blocks(options))
    card = harness.model.card
    edm = SamplerOptions(sampler="edm")
    rows = series("ODE (Heun)", "ode", edm, _budgets("--ode", options["ode"]), card)
    for spec in options["churn"]:
        budgets = _budgets("--sde", options["sde"])
        rows += series(f"SDE (EDM, churn {spec})", "sde", churned(spec), budgets, card)
    walkers = SamplerOptions(
        sampler="restart",
        main_solver=options["main_solver"],
        restart_solver=options["restart_solver"],
    )
    rows += restart_rows(options["restart"], walkers, card)
    if not rows:
        raise UserError("nothing is left to sweep: give --restart, --ode or --sde")
    more = {"rows": [row.sampler.label for row in rows]}
    record = make_record("nfe_sweep", options, harness, more)
    return ComparisonJob(harness, {}, rows, [], [], options["outdir"], record)


def series(
    title: str, group: str, options: SamplerOptions, budgets: Sequence[int], card: Card
) -> list[Row]:
    """The sampler of ``options`` at each of the ``budgets``."""
    rows = []
    for nfe in budgets:
        sampler = build(replace(options, nfe=nfe), card)
        detail = f"{sampler.settings['num_steps']} nodes and 0"
        rows.append(Row(title, group, nfe, sampler, detail))
    return rows


def churned(spec: str) -> SamplerOptions:
    """EDM's stochastic sampler by a name of `CHURN`, or by ``S_churn,S_min,S_max,S_noise``."""
    try:
        churn, low, high, noise = CHURN.get(spec) or map(float, spec.split(","))
    except ValueError:
        raise UserError(
            f"--churn {spec!r} is none of {', '.join(CHURN)}, nor four numbers "
            "S_churn,S_min,S_max,S_noise such as 30,0.01,1,1.007"
        ) from None
    return SamplerOptions(sampler="edm", S_churn=churn, S_min=low, S_max=high, S_noise=noise)


def restart_rows(specs: Sequence[str], walkers: SamplerOptions, card: Card) -> list[Row]:
    """Restart by each of ``specs`` (see `configurations_of`), with the solvers of ``walkers``."""
    by = [walkers.main_solver or "heun", walkers.restart_solver or "heun"]
    title = "Restart" if set(by) == {"heun"} else f"Restart ({by[0]}, descents {by[1]})"
    rows: dict[str, Row] = {}
    for spec in specs:
        for detail, chosen in configurations_of(spec).items():
            sampler = build(replace(walkers, **chosen), card)
            rows[detail] = Row(title, "restart", sampler.nfe, sampler, detail)
    return list(rows.values())


def configurations_of(spec: str) -> dict[str, dict[str, Any]]:
    """The options of the configurations that ``spec`` names, each under what to call it.

    A name of the published table; the model of some rows there (``cifar10-vp``), for all of them;
    a file of published ``N {json}`` lines, for all of them; or whatever ``--restart_info`` reads.
    """
    known = configurations()
    published = [name for name, row in known.items() if spec in (name, row.model)]
    if published:
        return {name: {"restart_config": name} for name in published}
    if Path(spec).is_file():
        lines = (
            f"{'' if n is None else f'{n} '}{interval_json(intervals)}"
            for n, intervals in read_configurations(spec).values()
        )
        return {line: {"restart_info": line} for line in lines}
    if "{" not in spec and ":" not in spec:
        raise UserError(
            f"--restart {spec!r} is neither a file nor a published configuration: choose one of "
            f"{', '.join(known)}, or give 'N {{json}}'"
        )
    return {spec: {"restart_info": spec}}


def _budgets(flag: str, text: str) -> list[int]:
    return [] if text == "none" else numbers(flag, text, 1)
