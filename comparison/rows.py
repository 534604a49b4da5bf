"""The rows of a comparison: every sampler that spends a budget exactly, and the ceilings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from amed.experiments import find_run, load_predictor
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from denoisers.cards import Card
from restart.intervals import parse_restart_line
from runtime.errors import UserError
from runtime.record import RunRecord
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.builders.restart import interval_json, restart_info
from samplers.options import SamplerOptions
from samplers.sampler import Sampler

#: Classic solvers of the table with the schedules they are published with on this grid family
#: (AMED, arXiv:2312.00094, appendix): polynomial for slopes in sigma, log-SNR for those in lambda.
CLASSIC = {
    "euler": ("Euler", "polynomial"),
    "dpm": ("DPM-Solver-2", "logsnr"),
    "dpmpp": ("DPM-Solver++(3)", "logsnr"),
    "ipndm": ("iPNDM(4)", "polynomial"),
}
STUDENT_NAMES = {
    "amed": "AMED-Solver",
    "euler": "AMED plugin on Euler",
    "dpm": "AMED plugin on DPM-Solver-2",
    "dpmpp": "AMED plugin on DPM-Solver++",
    "ipndm": "AMED plugin on iPNDM",
}
#: The classic solver that a student refines: the AMED rule is DPM-Solver-2 with other weights.
OWN_SOLVER = {"amed": "dpm", "euler": "euler", "dpm": "dpm", "dpmpp": "dpmpp", "ipndm": "ipndm"}

SLUG = 200  #: characters of a row's name in a file name, of which 255 are possible


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table."""

    method: str  #: ``iPNDM(4) + AFS``
    group: str  #: classic, learned, restart, ode, sde, pds or ceiling
    budget: int | None  #: None for a ceiling
    sampler: Sampler
    detail: str = ""  #: schedule, teacher or the chosen plan, in words
    own_solver: str | None = None  #: method of the classic row that this one is held against

    @property
    def key(self) -> str:
        """A file name for this row: unique within a comparison."""
        told = self.group in ("learned", "restart")  # several of one method at one budget
        name = f"{self.method}-{self.detail}" if told else self.method
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("++", "pp")).strip("-")
        if len(slug) > SLUG:
            slug = f"{slug[:SLUG]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return f"nfe{self.sampler.nfe:03d}-{slug}"


def classic_rows(budget: int, card: Card, schedule: str | None = None) -> list[Row]:
    """Each classic solver without and with AFS, where a grid spends exactly ``budget``."""
    rows = []
    for name, (title, usual) in CLASSIC.items():
        for afs in (False, True):
            options = SamplerOptions(
                sampler=name, nfe=budget, afs=afs, schedule_type=schedule or usual
            )
            try:
                sampler = build(options, card)
            except UserError:  # no grid of this solver spends the budget exactly
                continue
            detail = f"{schedule or usual}, {sampler.settings['num_steps']} nodes"
            rows.append(Row(_with_afs(title, afs), "classic", budget, sampler, detail))
    return rows


@dataclass(frozen=True)
class TrainedStudent:
    """A trained student as it was found on disk."""

    name: str
    predictor: AMEDPredictor
    settings: StudentSettings
    record: RunRecord

    @property
    def teacher(self) -> str:
        """The teacher in words: solver, inserted nodes, target, and what it spent."""
        options, plan = self.record.options, self.record.plan
        words = [f"{self.settings.sampler_tea} teacher, M = {self.settings.M}"]
        if self.settings.sampler_tea == "restart":
            words.append(f"{options['restart_target']} targets, {options['restart_info']}")
        if plan.get("teacher_nfe"):
            words.append(f"{plan['teacher_nfe']} NFE")
        return ", ".join(words)

    @property
    def length(self) -> str:
        kimg = self.record.options["total_kimg"]
        return "unknown length" if kimg is None else f"{round(kimg * 1000)} trajectories"


def load_students(
    specs: Iterable[str], card: Card, root: str | Path, device: torch.device
) -> list[TrainedStudent]:
    """Read predictors by number, folder or file.

    Raises UserError for one that is missing or was trained for another model.
    """
    students = []
    for spec in specs:
        predictor, settings, record = load_predictor(spec, root)
        if settings.dataset_name != card.name:
            raise UserError(
                f"predictor {spec} was trained for {settings.dataset_name!r}, but this comparison "
                f"is on {card.name!r}; leave it out, or train one for this model"
            )
        students.append(
            TrainedStudent(find_run(spec, root).name, predictor.to(device), settings, record)
        )
    return students


def learned_rows(budget: int, students: Iterable[TrainedStudent], card: Card) -> list[Row]:
    """The students whose budget this is."""
    rows = []
    for s in students:
        if s.settings.nfe() != budget:
            continue
        sampler = build_learned(SamplerOptions(), s.predictor, s.settings, s.record, s.name, card)
        kind = s.settings.sampler_stu
        own = _with_afs(CLASSIC[OWN_SOLVER[kind]][0], s.settings.afs)
        detail = f"{s.teacher}; {s.length}"
        rows.append(Row(STUDENT_NAMES[kind], "learned", budget, sampler, detail, own))
    return rows


#: What a student walks (``--learned``) and what such a row is called.
SEGMENTS = {"main": "{} main", "restart": "{} descents", "both": "{}"}


def learned_restart_rows(
    students: Iterable[TrainedStudent], card: Card, info: str | None = None
) -> list[Row]:
    """Restart with each student on the main walk, in the descents and on both; and Heun instead.

    A row by Heun has the same nodes, jumps and free first step, so the same NFE, and is what the
    student's row is held against.  ``info`` are the intervals, the model's own by default; the
    main walk that is not the student's has N nodes where ``info`` is ``N {json}``, or else as many
    as the student's.
    """
    stated, intervals = parse_restart_line(restart_info(SamplerOptions(restart_info=info), card))
    info = interval_json(intervals)
    rows: dict[tuple[str, int], Row] = {}
    for s in students:
        for which, words in SEGMENTS.items():
            nodes = (stated or s.settings.num_steps) if which == "restart" else None
            options = SamplerOptions(
                sampler="restart", learned=which, restart_info=info, num_steps=nodes
            )
            sampler = build_learned(options, s.predictor, s.settings, s.record, s.name, card)
            heun = _by_heun(sampler, info, card)
            schedule = f"{heun.settings['schedule_type']} {heun.settings['schedule_rho'] or ''}"
            by_heun = f"Restart, Heun ({schedule.strip()}{'' if which == 'restart' else ', no 0'})"
            title = f"Restart, {words.format(STUDENT_NAMES[s.settings.sampler_stu])}"
            detail = f"{s.teacher}; {info}; {s.length}"
            row = Row(title, "learned", sampler.nfe, sampler, detail, by_heun)
            rows[f"{title} {s.name}", sampler.nfe] = row
            rows[by_heun, heun.nfe] = Row(by_heun, "restart", heun.nfe, heun, info)
    return list(rows.values())


def _by_heun(sampler: Sampler, info: str, card: Card) -> Sampler:
    """The plan of ``sampler`` with all its segments walked by Heun."""
    same = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max", "afs")
    grid = {key: sampler.settings[key] for key in (*same, "final_zero")}
    options = SamplerOptions(sampler="restart", restart_info=info, **grid)
    return build(dataclasses.replace(options, guidance_rate=sampler.guidance_rate), card)


def pds_rows(
    iterations: Iterable[int],
    card: Card,
    freq_mask_path: str | None = None,
    space_mask_path: str | None = None,
) -> list[Row]:
    """Predictor-corrector chains without and with preconditioning, at their real NFE."""
    masks = {"freq_mask_path": freq_mask_path, "space_mask_path": space_mask_path}
    rows = []
    for number in iterations:
        for title, chosen in (("predictor-corrector", {"freq_mask_path": "none"}), ("PDS", masks)):
            sampler = build(SamplerOptions(sampler="pds", num_steps=number, **chosen), card)
            kinds = [kind for kind in ("freq", "space") if sampler.settings[f"{kind}_mask"]]
            detail = ", ".join([f"{number} iterations", *(f"{kind} mask" for kind in kinds)])
            rows.append(Row(title, "pds", sampler.nfe, sampler, detail))
    return rows


def ceiling_rows(card: Card) -> list[Row]:
    """What many evaluations reach: EDM's deterministic Heun and Restart around it."""
    heun = build(SamplerOptions(sampler="edm", num_steps=18), card)
    rows = [Row(f"Heun-{heun.nfe}", "ceiling", None, heun, "18 nodes and 0")]
    if card.restart_info:
        restart = build(SamplerOptions(sampler="restart", num_steps=18), card)
        info = json.dumps({k: list(v) for k, v in card.restart_info.items()})
        rows.append(Row(f"Restart-{restart.nfe}", "ceiling", None, restart, info))
    return rows


def restart_row(budget: int, sampler: Sampler) -> Row:
    """Restart at a small budget, by the plan that was chosen for it.

    It is held against the solver of its main walk, where that is a classic row.
    """
    main, afs = sampler.settings["main_solver"], bool(sampler.settings["afs"])
    own = _with_afs(CLASSIC[main][0], afs) if main in CLASSIC else None
    return Row("Restart", "restart", budget, sampler, sampler.label, own)


def distinct(rows: list[Row]) -> list[Row]:
    """The rows with keys made unique, so that two students of one kind keep two files."""
    seen: dict[str, int] = {}
    out = []
    for row in rows:
        count = seen[row.key] = seen.get(row.key, 0) + 1
        if count > 1:
            row = dataclasses.replace(row, detail=f"{row.detail} (run {count})")
        out.append(row)
    return out


def _with_afs(title: str, afs: bool) -> str:
    return f"{title} + AFS" if afs else title
