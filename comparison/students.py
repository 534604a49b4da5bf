"""Trained students as rows: by themselves at their own budget, and as the solver inside Restart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from amed.experiments import TrainedStudent
from comparison.rows import Row, solver_title
from denoisers.cards import Card
from ns.experiments import AnyStudent, TrainedTable, load_student
from restart.intervals import interval_json, resolve_intervals
from runtime.errors import UserError
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.options import SamplerOptions
from samplers.sampler import Sampler

ROOT = "exps"  #: where runs are looked up by number
TITLES = {
    "amed": "AMED-Solver",
    "euler": "AMED plugin on Euler",
    "dpm": "AMED plugin on DPM-Solver-2",
    "dpmpp": "AMED plugin on DPM-Solver++",
    "ipndm": "AMED plugin on iPNDM",
}
#: The classic solver that a student refines: the AMED rule is DPM-Solver-2 with other weights.
OWN_SOLVER = {"amed": "dpm", "euler": "euler", "dpm": "dpm", "dpmpp": "dpmpp", "ipndm": "ipndm"}
#: What a student walks inside Restart (``--learned``), and what such a row is called.
SEGMENTS = {"main": "{} main", "restart": "{} descents", "both": "{}"}


def load_students(specs: Sequence[str], card: Card) -> list[AnyStudent]:
    """Read the students of ``--predictors``: numbers, folders or files.

    Raises UserError for one that is missing or was trained for another model.
    """
    students: list[AnyStudent] = []
    for spec in specs:
        student = load_student(spec, ROOT)
        if student.dataset_name != card.name:
            raise UserError(
                f"predictor {spec} was trained for {student.dataset_name!r}, but this "
                f"comparison is on {card.name!r}; leave it out, or train one for this model"
            )
        students.append(student)
    return students


def table_rate(asked: float | None, students: Sequence[AnyStudent]) -> float | None:
    """The guidance rate of every row: the one that was asked for, or the students' own.

    Raises UserError where none was asked for and the students were trained with different ones.
    """
    if asked is not None or not students:
        return asked
    by_rate: dict[float | None, list[str]] = {}
    for student in students:
        by_rate.setdefault(student.guidance_rate, []).append(student.name)
    if len(by_rate) > 1:
        trained = "; ".join(
            f"{', '.join(names)}: {'none' if rate is None else f'{rate:g}'}"
            for rate, names in by_rate.items()
        )
        raise UserError(
            f"the predictors were trained with different guidance rates ({trained}), and all rows "
            "of a table have the same one: give --guidance_rate, or compare them separately"
        )
    return next(iter(by_rate))


def learned_rows(
    students: Iterable[AnyStudent], card: Card, guidance_rate: float | None = None
) -> list[Row]:
    """Each student by itself; its budget is what its sampler spends under this guidance."""
    rows = []
    for student in students:
        sampler = build_learned(SamplerOptions(guidance_rate=guidance_rate), student, card)
        if isinstance(student, TrainedTable):
            rows.append(_table_row(student, sampler))
            continue
        settings = student.settings
        own = solver_title(OWN_SOLVER[settings.sampler_stu], settings.afs)
        detail = f"{teacher_words(student)}; {training_length(student)}"
        title = TITLES[settings.sampler_stu]
        rows.append(Row(title, "learned", sampler.nfe, sampler, detail, own))
    return rows


def _table_row(student: TrainedTable, sampler: Sampler) -> Row:
    """A table, compared with iPNDM and a free first step, the table that its search begins with."""
    options, plan = student.record.options, student.record.plan
    words = [f"{options['sampler_tea']} teacher"]
    if plan.get("teacher_nfe"):
        words.append(f"{plan['teacher_nfe']} NFE")
    length = f"{student.latents} trajectories, {options['refine']} updates"
    detail = f"{', '.join(words)}; {length}"
    own = solver_title("ipndm", afs=True)
    return Row("NS solver", "learned", sampler.nfe, sampler, detail, own)


def teacher_words(student: TrainedStudent) -> str:
    """The teacher in words: solver, inserted nodes, targets, and the NFE that it spent."""
    settings, options, plan = student.settings, student.record.options, student.record.plan
    stored = options.get("trajectories")  # older records lack it
    words, restart = [f"{settings.sampler_tea} teacher"], settings.sampler_tea == "restart"
    if stored is None or restart:
        words.append(f"M = {settings.M}")
    if stored is not None:
        words.append(f"{stored} kept trajectories")
    if restart:
        words.append(f"{options['restart_target']} targets, {options['restart_info']}")
    if plan.get("teacher_nfe"):
        words.append(f"{plan['teacher_nfe']} NFE")
    return ", ".join(words)


def training_length(student: TrainedStudent) -> str:
    """How many trajectories the student was trained on, in words."""
    kimg = student.record.options["total_kimg"]
    return "unknown length" if kimg is None else f"{round(kimg * 1000)} trajectories"


def learned_restart_rows(
    students: Iterable[AnyStudent],
    card: Card,
    info: str | None = None,
    guidance_rate: float | None = None,
) -> list[Row]:
    """Restart with each student on the main walk, in the descents and on both; and with Heun.

    A row with Heun has the same nodes, jumps and free first step, so the same NFE; the student's
    row is compared with it.  ``info`` gives the intervals, by default the model's own; a main walk
    that is not the student's has N nodes where ``info`` is ``N {json}``, otherwise as many as the
    student's.
    """
    stated, intervals = resolve_intervals(info, card)
    info = interval_json(intervals)
    rows: dict[tuple[str, int], Row] = {}
    for student in students:
        if isinstance(student, TrainedTable):  # a whole sampler, which has no walk to lend
            continue
        for which, words in SEGMENTS.items():
            nodes = (stated or student.settings.num_steps) if which == "restart" else None
            options = SamplerOptions(
                sampler="restart",
                learned=which,
                restart_info=info,
                num_steps=nodes,
                guidance_rate=guidance_rate,
            )
            sampler = build_learned(options, student, card)
            heun = _heun_row(sampler, card, info, zero=which == "restart")
            title = f"Restart, {words.format(TITLES[student.settings.sampler_stu])}"
            detail = f"{teacher_words(student)}; {info}; {training_length(student)}"
            row = Row(title, "learned", sampler.nfe, sampler, detail, heun.method)
            rows[f"{title} {student.name}", sampler.nfe] = row
            rows[heun.method, heun.sampler.nfe] = heun
    return list(rows.values())


def _heun_row(learned: Sampler, card: Card, info: str, zero: bool) -> Row:
    """The plan of ``learned`` with Heun on all its segments."""
    own = learned.options
    options = SamplerOptions(
        sampler="restart",
        num_steps=own.num_steps,
        afs=own.afs,
        schedule_type=own.schedule_type,
        schedule_rho=own.schedule_rho,
        sigma_min=own.sigma_min,
        sigma_max=own.sigma_max,
        restart_info=info,
        final_zero=own.final_zero,
        guidance_rate=own.guidance_rate,
    )
    heun = build(options, card)
    schedule = f"{heun.options.schedule_type} {heun.options.schedule_rho or ''}".strip()
    title = f"Restart, Heun ({schedule}{'' if zero else ', no 0'})"
    return Row(title, "restart", heun.nfe, heun, info)
