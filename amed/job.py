"""From command-line options to everything a training run needs, checked before work starts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from amed.experiments import RECORD, list_runs
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from amed.step import Student
from amed.trainer import Data, Loop, Report
from denoisers.cards import Card
from denoisers.conditions import Conditions
from denoisers.prior import start
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from restart.intervals import parse_restart_info
from runtime.dist import World
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from solvers.driver import integrate
from teachers.build import build_teacher
from teachers.supervision import RestartTeacher, Teacher, teacher_nfe

PREVIEW_SEEDS = range(16)


@dataclass(frozen=True)
class TrainingJob:
    """A training run, resolved."""

    #: Options that may differ between the start of a run and its continuation.
    IGNORED: ClassVar[tuple[str, ...]] = ("outdir", "batch_gpu", "bench", "desc", "cache_dir")

    predictor: AMEDPredictor
    student: Student
    teacher: Teacher
    data: Data
    loop: Loop
    record: RunRecord
    name: str  #: of the folder, without its number
    preview: Report
    note: str | None  #: what a person should know before waiting for the result


def prepare(options: dict[str, Any], world: World) -> TrainingJob:
    """Load the model and resolve every option.

    Raises UserError or ValueError, in one sentence, for options that make no sense together.
    """
    _check(options, world)
    source = ModelSource.from_options(options)
    card = source.card()
    conditions = _conditions(options, card)
    settings = _settings(options, card.sigma_min, card.sigma_max)
    fine, stride = settings.teacher_grid(**card.time_maps)
    restart = settings.sampler_tea == "restart"
    info = _restart_info(options, card) if restart else None
    teacher = build_teacher(
        settings.sampler_tea,
        None if restart or settings.sampler_tea == "dopri5" else settings.teacher_solver(),
        fine,
        stride,
        restart_info=info,
        restart_target=options["restart_target"],
        s_noise=options["S_noise"],
        pfgmpp=card.pfgmpp,
        histories=settings.solver().max_order > 1,
    )
    student = Student(settings.solver(), settings.grid(**card.time_maps), settings.afs)
    predictor = AMEDPredictor(settings.scale_dir, settings.scale_time, seed=options["seed"])
    model = source.load(options["dtype"], world)
    data = _data(model, conditions, options, world)
    cost = card.cost(settings.guidance_rate)
    resolved = {**options, **settings.to_options(), "restart_info": info}
    resolved |= {"prompts": conditions.describe()}
    record = RunRecord.make(
        "train",
        resolved,
        {"name": card.name, "sha256": model.sha256},
        {
            "times": student.ts.tolist(),
            "nfe": settings.nfe(cost),
            "teacher_nfe": teacher_nfe(teacher, cost),
            "parameters": sum(p.numel() for p in predictor.parameters()),
        },
    )
    name = settings.run_name(cost) + (f"-{options['desc']}" if options["desc"] else "")
    return TrainingJob(
        predictor.to(world.device, data.dtype),
        student,
        teacher,
        data,
        _loop(options, world),
        record,
        name,
        _preview(model, conditions, student, data),
        _note(teacher, student),
    )


def resumable(root: str | Path, record: RunRecord) -> Path | None:
    """The newest run below ``root`` that was started with the same options, model and plan."""
    for _, folder in sorted(list_runs(root).items(), reverse=True):
        path = folder / RECORD
        if not path.is_file():
            continue
        try:
            found = RunRecord.read(path)
        except UserError:
            continue  # somebody else's or a newer record: not this run
        if not found.differences(record, TrainingJob.IGNORED):
            return folder
    return None


def _settings(options: dict[str, Any], sigma_min: float, sigma_max: float) -> StudentSettings:
    chosen = dict(options)
    if chosen["schedule_type"] is None:
        chosen["schedule_type"] = "polynomial"
        chosen["schedule_rho"] = chosen["schedule_rho"] or 7.0
    return StudentSettings.from_options({**chosen, "sigma_min": sigma_min, "sigma_max": sigma_max})


def _check(options: dict[str, Any], world: World) -> None:
    if options["restart_info"] and options["sampler_tea"] != "restart":
        raise UserError(
            f"--restart_info was given, but the teacher is {options['sampler_tea']}; "
            "add --sampler_tea=restart or leave it out"
        )
    if options["batch"] < world.size:
        raise UserError(
            f"--batch={options['batch']} leaves some of {world.size} processes without work; "
            f"give --batch {world.size} or more"
        )


def _conditions(options: dict[str, Any], card: Card) -> Conditions:
    names = ("prompt", "prompt_path", "guidance_rate", "guidance_type")
    return Conditions.of(card, **{name: options[name] for name in names})


def _restart_info(options: dict[str, Any], card: Card) -> str:
    """The intervals as JSON, whichever way they were given, so that the record holds them."""
    if not options["restart_info"] and not card.restart_info:
        raise UserError(
            f"{card.name!r} has no restart intervals of its own: give --restart_info "
            "'{\"0\": [N_restart, K, t_min, t_max]}' between its noise levels "
            f"{card.sigma_min:.3g} and {card.sigma_max:.3g}"
        )
    given = options["restart_info"] or json.dumps(dict(card.restart_info))
    rows = {str(i): dataclasses.astuple(v) for i, v in enumerate(parse_restart_info(given))}
    return json.dumps(rows)


def _note(teacher: Teacher, student: Student) -> str | None:
    if not isinstance(teacher, RestartTeacher) or not teacher.flow or teacher.changes_starts:
        return None
    return (
        "note: with --restart_target=flow this Restart teacher gives a Heun teacher's targets, "
        "since it restarts below every noise level that an interval starts from; let t_max of "
        f"--restart_info exceed {float(student.ts[-2]):.3g}, or take --restart_target=trajectory"
    )


def _data(model: Model, conditions: Conditions, options: dict[str, Any], world: World) -> Data:
    return Data(
        bind=lambda noise, stream: conditions.bind(model, noise, world.device, stream),
        card=model.card,
        seed=options["seed"],
        dtype=torch.float64 if options["dtype"] == "float64" else torch.float32,
        device=world.device,
    )


def _loop(options: dict[str, Any], world: World) -> Loop:
    total = math.ceil(options["total_kimg"] * 1000)
    share = -(-options["batch"] // world.size)
    return Loop(
        total=total,
        batch=options["batch"],
        micro=min(options["batch_gpu"] or share, share),
        tick=round(options["tick"] * 1000),
        snap=options["snap"],
        lr=options["lr"],
    )


def _preview(model: Model, conditions: Conditions, student: Student, data: Data) -> Report:
    """The student's samples of a few fixed seeds, for TensorBoard."""
    seeds = list(PREVIEW_SEEDS)

    @torch.no_grad()
    def preview(predictor: AMEDPredictor) -> Tensor:
        noise = SeedNoise(seeds)
        x = start(model.card, noise, student.ts[0], data.dtype, data.device)
        denoiser = conditions.bind(model, noise, data.device, ("preview",))
        ts, afs = student.ts, student.afs
        return model.decode(integrate(student.solver, denoiser, x, ts, predictor, afs).x[-1])

    return preview
