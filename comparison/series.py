"""FID against NFE in whole series: ODE, SDE and Restart, as in figure 3 of arXiv:2306.14878.

A sweep over NFE is a comparison with other rows: harness, files, resuming and report are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comparison.job import ComparisonJob, check_conditions, row_seeds
from comparison.rows import Row
from denoisers.cards import Card
from evaluation.harness import HarnessOptions
from restart.intervals import interval_json, read_configurations
from restart.tables import configurations
from runtime.errors import UserError
from runtime.lists import parse_whole_numbers
from runtime.options import Json
from samplers.build import build
from samplers.options import SamplerOptions
from solvers.grids import MOST_NODES

NONE = "none"


@dataclass(frozen=True)
class Noise:
    """Settings of EDM's stochastic sampler (arXiv:2206.00364, table 5)."""

    S_churn: float
    S_min: float
    S_max: float
    S_noise: float


#: As published, by data set and model.
CHURN = {
    "cifar10-vp": Noise(30.0, 0.01, 1.0, 1.007),
    "cifar10-ve": Noise(80.0, 0.05, 1.0, 1.007),
    "imagenet64-adm": Noise(80.0, 0.05, 50.0, 1.003),
    "imagenet64-edm": Noise(40.0, 0.05, 50.0, 1.003),
}


@dataclass(frozen=True)
class NfeSweepOptions:
    """What ``tools.nfe_sweep`` is asked for, under the names of its flags."""

    harness: HarnessOptions
    restart: tuple[str, ...] = ()  #: each as `configurations_of` reads it
    ode: str = NONE  #: NFE of Heun
    sde: str = NONE  #: NFE of EDM's stochastic sampler
    churn: tuple[str, ...] = ()  #: each as `churned` reads it
    main_solver: str | None = None
    restart_solver: str | None = None
    num: int = 2000  #: images per row
    blocks: int = 4
    outdir: Path = Path("samples/sweep")


def prepare(options: NfeSweepOptions) -> ComparisonJob:
    """Lay out the series.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = row_seeds(options.num, options.blocks)
    card = options.harness.model.card()
    check_conditions(options.harness, seeds)
    rows = _ode_rows(options, card) + _sde_rows(options, card)
    walkers = SamplerOptions(
        sampler="restart",
        main_solver=options.main_solver,
        restart_solver=options.restart_solver,
        guidance_rate=options.harness.conditions.guidance_rate,
    )
    rows += restart_rows(options.restart, walkers, card)
    if not rows:
        raise UserError("nothing is left to sweep: give --restart, --ode or --sde")
    facts: dict[str, Json] = {"rows": [row.sampler.label for row in rows]}
    return ComparisonJob(
        "nfe_sweep", options, options.harness, card, seeds, options.blocks, options.outdir,
        {}, rows, [], [], 0, facts,
    )  # fmt: skip


def _ode_rows(options: NfeSweepOptions, card: Card) -> list[Row]:
    rate = options.harness.conditions.guidance_rate
    edm = SamplerOptions(sampler="edm", guidance_rate=rate)
    return series("ODE (Heun)", "ode", edm, _budgets("--ode", options.ode), card)


def _sde_rows(options: NfeSweepOptions, card: Card) -> list[Row]:
    rate, budgets = options.harness.conditions.guidance_rate, _budgets("--sde", options.sde)
    rows = []
    for spec in options.churn:
        asked = replace(churned(spec), guidance_rate=rate)
        rows += series(f"SDE (EDM, churn {spec})", "sde", asked, budgets, card)
    return rows


def series(
    title: str, group: str, options: SamplerOptions, budgets: Sequence[int], card: Card
) -> list[Row]:
    """The sampler of ``options`` at each of the ``budgets``."""
    rows = []
    for nfe in budgets:
        sampler = build(replace(options, nfe=nfe), card)
        detail = f"{sampler.options.num_steps} nodes and 0"
        rows.append(Row(title, group, nfe, sampler, detail))
    return rows


def churned(spec: str) -> SamplerOptions:
    """EDM's stochastic sampler by a name of `CHURN`, or by ``S_churn,S_min,S_max,S_noise``."""
    try:
        noise = CHURN.get(spec) or Noise(*map(float, spec.split(",")))
    except (TypeError, ValueError):
        raise UserError(
            f"--churn {spec!r} is none of {', '.join(CHURN)}, nor four numbers "
            "S_churn,S_min,S_max,S_noise such as 30,0.01,1,1.007"
        ) from None
    return SamplerOptions(
        sampler="edm",
        S_churn=noise.S_churn,
        S_min=noise.S_min,
        S_max=noise.S_max,
        S_noise=noise.S_noise,
    )


def restart_rows(specs: Sequence[str], walkers: SamplerOptions, card: Card) -> list[Row]:
    """Restart by each of ``specs`` (see `configurations_of`), with the solvers of ``walkers``."""
    by = [walkers.main_solver or "heun", walkers.restart_solver or "heun"]
    title = "Restart" if set(by) == {"heun"} else f"Restart ({by[0]}, descents {by[1]})"
    rows: dict[str, Row] = {}
    for spec in specs:
        for detail, options in configurations_of(spec, walkers).items():
            sampler = build(options, card)
            rows[detail] = Row(title, "restart", sampler.nfe, sampler, detail)
    return list(rows.values())


def configurations_of(spec: str, walkers: SamplerOptions) -> dict[str, SamplerOptions]:
    """``walkers`` with the configurations that ``spec`` names, by what to call each.

    ``spec`` is a name of the published table; the model of some of its rows (``cifar10-vp``), for
    all of them; a file of published ``N {json}`` lines, for all of them; or anything else that
    ``--restart_info`` reads.
    """
    known = configurations()
    published = [name for name, row in known.items() if spec in (name, row.model)]
    if published:
        return {name: replace(walkers, restart_config=name) for name in published}
    if Path(spec).is_file():
        lines = (
            f"{'' if n is None else f'{n} '}{interval_json(intervals)}"
            for n, intervals in read_configurations(spec).values()
        )
        return {line: replace(walkers, restart_info=line) for line in lines}
    if "{" not in spec and ":" not in spec:
        raise UserError(
            f"--restart {spec!r} is neither a file nor a published configuration: choose one of "
            f"{', '.join(known)}, or give 'N {{json}}'"
        )
    return {spec: replace(walkers, restart_info=spec)}


def _budgets(flag: str, text: str) -> list[int]:
    return [] if text == NONE else parse_whole_numbers(flag, text, 1, MOST_NODES)
