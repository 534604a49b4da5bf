"""The rows of a comparison: every sampler that spends a budget exactly, and the ceilings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from denoisers.cards import Card
from runtime.errors import UserError
from runtime.lists import parse_words
from samplers.build import build
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from samplers.schedulers import diffusers_samplers


@dataclass(frozen=True)
class ListedSolver:
    """A classic solver as tables list it."""

    title: str
    schedule: str  #: the grid that it is published with; flows have their own


#: The grids are those of the AMED paper (arXiv:2312.00094, appendix): polynomial for solvers that
#: work with slopes in sigma, uniform in log-SNR for those that work in lambda.  DEIS works with
#: slopes in lambda; at five evaluations its solver error is smaller on the polynomial grid.
LISTED = {
    "euler": ListedSolver("Euler", "polynomial"),
    "dpm": ListedSolver("DPM-Solver-2", "logsnr"),
    "dpmpp": ListedSolver("DPM-Solver++(3)", "logsnr"),
    "ipndm": ListedSolver("iPNDM(4)", "polynomial"),
    "ipndm_v": ListedSolver("iPNDM_v(4)", "polynomial"),
    "deis": ListedSolver("DEIS(3)", "polynomial"),
    "unipc": ListedSolver("UniPC(3)", "logsnr"),
}
DEFAULT_SOLVERS = "euler,dpm,dpmpp,ipndm"  #: of ``--solvers``
SLUG = 200  #: characters of a row's name in a file name; most file systems allow 255
CEILING_STEPS = 18  #: nodes of the ceilings, a final 0 not counted: EDM's setting for CIFAR-10


@dataclass(frozen=True, eq=False)
class Row:
    """What is to be measured for one line of the table."""

    method: str  #: ``iPNDM(4) + AFS``
    group: str  #: classic, diffusers, learned, restart, ode, sde, pds or ceiling
    budget: int | None  #: network evaluations; None for a ceiling
    sampler: Sampler
    detail: str = ""  #: schedule, teacher or the chosen plan, in words
    own_solver: str | None = None  #: method of the classic row that this one is compared with

    @property
    def key(self) -> str:
        """A file name for this row, unique within a comparison."""
        several = self.group in ("learned", "restart")  # may share method and budget
        name = f"{self.method}-{self.detail}" if several else self.method
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("++", "pp")).strip("-")
        if len(slug) > SLUG:
            slug = f"{slug[:SLUG]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return f"nfe{self.sampler.nfe:03d}-{slug}"

    def __str__(self) -> str:
        return f"{self.sampler.nfe} NFE: {self.method}, {self.detail}"


def solver_title(solver: str, afs: bool) -> str | None:
    """What the classic row of ``solver`` is called; None for a solver that tables do not list."""
    if solver not in LISTED:
        return None
    return f"{LISTED[solver].title} + AFS" if afs else LISTED[solver].title


def parse_solvers(text: str) -> list[str]:
    """The solvers of ``--solvers``; UserError for one that tables do not list."""
    names = parse_words(text)
    unlisted = [name for name in names if name not in LISTED]
    if unlisted or not names:
        raise UserError(f"--solvers {text!r} is not a list of {', '.join(LISTED)}; separate by ','")
    return list(dict.fromkeys(names))


def classic_rows(
    budget: int,
    card: Card,
    guidance_rate: float | None = None,
    schedule: str | None = None,
    solvers: str = DEFAULT_SOLVERS,
) -> list[Row]:
    """Each of ``solvers`` (by comma) without and with AFS, where a grid spends exactly ``budget``.

    ``schedule`` replaces the one that each solver is published with.
    """
    rows = []
    for name in parse_solvers(solvers):
        listed = LISTED[name]
        for afs in (False, True):
            options = SamplerOptions(
                sampler=name,
                nfe=budget,
                afs=afs,
                schedule_type=schedule
                or (card.default_schedule if card.is_flow else listed.schedule),
                guidance_rate=guidance_rate,
            )
            try:
                sampler = build(options, card)
            except UserError:  # no grid of this solver spends the budget exactly
                continue
            detail = f"{options.schedule_type}, {sampler.options.num_steps} nodes"
            rows.append(Row(str(solver_title(name, afs)), "classic", budget, sampler, detail))
    return rows


def timed_rows(
    times: tuple[float, ...] | None,
    budgets: Sequence[int],
    card: Card,
    guidance_rate: float | None = None,
    solvers: str = DEFAULT_SOLVERS,
) -> dict[int, list[Row]]:
    """``solvers`` on the given noise levels, by budget; they are compared with their own rows.

    Raises ValueError for levels that are no grid, and UserError if they spend none of the budgets.
    """
    rows: dict[int, list[Row]] = {budget: [] for budget in budgets}
    if times is None:
        return rows
    asked, cost = SamplerOptions(times=times, guidance_rate=guidance_rate), card.cost(guidance_rate)
    for name in parse_solvers(solvers):
        for afs in (False, True) if len(times) > 2 else (False,):
            sampler = build(replace(asked, sampler=name, afs=afs), card)
            own, detail = str(solver_title(name, afs)), f"{len(times)} given noise levels"
            if sampler.nfe in rows:
                row = Row(f"{own}, given levels", "classic", sampler.nfe, sampler, detail, own)
                rows[sampler.nfe].append(row)
    if not any(rows.values()):
        raise UserError(
            f"--times has {len(times)} noise levels, and no solver on them spends one of --budgets "
            f"{','.join(map(str, budgets))}: give --budgets {cost * (len(times) - 1)}"
        )
    return rows


def diffusers_rows(budget: int, card: Card, guidance_rate: float | None = None) -> list[Row]:
    """The schedulers of ``diffusers`` at ``budget``; UserError where it is not installed."""
    return [
        Row(f"diffusers {title}", "diffusers", budget, sampler, str(sampler.plan[0]))
        for title, sampler in diffusers_samplers(budget, card, guidance_rate).items()
    ]


def pds_rows(
    iterations: Iterable[int],
    card: Card,
    masks: SamplerOptions | None = None,
) -> list[Row]:
    """Predictor-corrector chains without and with preconditioning, at their own NFE.

    ``masks`` gives the mask files and the guidance rate; by default the bundled frequency mask.
    """
    asked = replace(masks or SamplerOptions(), sampler="pds")
    plain = replace(asked, freq_mask_path="none", space_mask_path=None)
    rows = []
    for number in iterations:
        for title, chosen in (("predictor-corrector", plain), ("PDS", asked)):
            sampler = build(replace(chosen, num_steps=number), card)
            kinds = [kind for kind in ("freq", "space") if sampler.extra[f"{kind}_mask"]]
            detail = ", ".join([f"{number} iterations", *(f"{kind} mask" for kind in kinds)])
            rows.append(Row(title, "pds", sampler.nfe, sampler, detail))
    return rows


def ceiling_rows(card: Card, guidance_rate: float | None = None) -> list[Row]:
    """What many evaluations reach: EDM's deterministic Heun sampler, and Restart around it."""
    rows = [heun_ceiling_row(CEILING_STEPS, card, guidance_rate)]
    if card.restart_info:
        asked = SamplerOptions(
            sampler="restart", num_steps=CEILING_STEPS, guidance_rate=guidance_rate
        )
        restart = build(asked, card)
        info = str(restart.options.restart_info)
        rows.append(Row(f"Restart-{restart.nfe}", "ceiling", None, restart, info))
    return rows


def heun_ceiling_row(nodes: int, card: Card, guidance_rate: float | None) -> Row:
    """EDM's deterministic Heun sampler on ``nodes`` nodes, a final 0 not counted."""
    asked = SamplerOptions(sampler="edm", num_steps=nodes, guidance_rate=guidance_rate)
    heun = build(asked, card)
    return Row(f"Heun-{heun.nfe}", "ceiling", None, heun, f"{nodes} nodes and 0")


def restart_row(budget: int, sampler: Sampler) -> Row:
    """Restart at a small budget, with the plan that was chosen for it.

    It is compared with the solver of its main walk, where that is a classic row.
    """
    main, afs = str(sampler.options.main_solver), bool(sampler.options.afs)
    return Row("Restart", "restart", budget, sampler, sampler.label, solver_title(main, afs))


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows with their keys made unique, so that two students of one kind keep two files."""
    seen: dict[str, int] = {}
    out = []
    for row in rows:
        count = seen[row.key] = seen.get(row.key, 0) + 1
        if count > 1:
            row = replace(row, detail=f"{row.detail} (run {count})")
        out.append(row)
    return out
