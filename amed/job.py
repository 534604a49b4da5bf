"""Training runs: options, the resolved job, and resuming."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amed.batches import (
    VARIANCE_DRAWS,
    VARIANCE_SAMPLES,
    Batches,
    Data,
    StoredBatches,
    TaughtBatches,
)
from amed.options import TrainOptions, check_options
from amed.predictor import AMEDPredictor
from amed.resume import is_longer, open_run
from amed.settings import StudentSettings
from amed.step import Student, repeated_calls
from amed.trainer import Loop, Preview, is_finished, train, updates_done
from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from denoisers.speed import Work, announce
from restart.intervals import interval_json, resolve_intervals
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import note
from runtime.noise import SeedNoise
from runtime.options import Json, flat_options
from runtime.outputs import check_writable, claimed
from runtime.record import RECORD, RunRecord
from solvers.driver import Meter, integrate
from solvers.grids import Grid
from teachers.build import RestartSupervision, build_teacher
from teachers.supervision import RestartTeacher, Teacher, teacher_nfe, visit_nfe
from teachers.trajectories import TrajectoryJob, TrajectoryOptions
from teachers.trajectories import prepare as prepare_trajectories

PREVIEW_SEEDS = range(16)
VARIANCE = VARIANCE_SAMPLES * VARIANCE_DRAWS  #: trajectories whose spread a report tells


@dataclass(frozen=True)
class TrainingJob:
    """A resolved training run; nothing has been loaded or written yet."""

    options: TrainOptions
    card: Card
    conditions: Conditions
    settings: StudentSettings
    student: Student
    teacher: Teacher
    restart: RestartSupervision  #: of a Restart teacher; without intervals for another
    stored: TrajectoryJob | None = None  #: the teacher's trajectories, if they are on disk

    @property
    def name(self) -> str:
        """The name of the folder, without its number."""
        desc = self.options.desc
        return self.settings.run_name(self._cost) + (f"-{desc}" if desc else "")

    @property
    def _teacher_nfe(self) -> int | None:
        """Of one trajectory; None for dopri5."""
        return self.stored.nfe if self.stored else teacher_nfe(self.teacher, self._cost)

    @property
    def _cost(self) -> int:
        return self.card.cost(self.settings.guidance_rate)

    def predictor(self) -> AMEDPredictor:
        """The initial predictor."""
        settings = self.settings
        return AMEDPredictor(settings.scale_dir, settings.scale_time, seed=self.options.seed)

    def record(self, weights_sha256: str | None) -> RunRecord:
        """Every resolved option, the model, and the plan of student and teacher."""
        resolved = flat_options(self.options) | self.settings.to_options()
        for key in ("resume", "label"):  # not options of training itself
            resolved.pop(key)
        intervals = self.restart.intervals
        resolved["restart_info"] = interval_json(intervals) if intervals else None
        resolved |= {"restart_target": self.restart.target, "S_noise": self.restart.S_noise}
        resolved["prompts"] = self.conditions.describe()
        plan: dict[str, Json] = {
            "times": self.student.ts.tolist(),
            "nfe": self.settings.nfe(self._cost),
            "teacher_nfe": self._teacher_nfe,
            "parameters": sum(p.numel() for p in self.predictor().parameters()),
        }
        model = {"name": self.card.name, "sha256": weights_sha256}
        return RunRecord.make("train", resolved, model, plan)

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.options.model.known_sha256).to_json()

    @property
    def source(self) -> ModelSource:
        return self.options.model

    def work(self, weights_sha256: str | None, done: int = 0) -> Work:
        """What is left after ``done`` updates."""
        loop = _loop(self.options, World(0, 1, torch.device("cpu")))
        left, disk = (loop.iterations - done) * loop.batch, 0
        nfe = self.settings.nfe(self._cost)
        inserted = (self.settings.num_steps - 1) * self._cost  # at the predictor's times
        if self.stored is None:
            repeated = repeated_calls(self.student, self.teacher) * self._cost
            forward = left * ((self._teacher_nfe or 0) + nfe - inserted - repeated)
        else:
            missing = self.stored.missing(weights_sha256)
            forward = missing * (self._teacher_nfe or 0) + left * (nfe - inserted)
            disk = missing * self.stored.bytes_per_latent
        report = len(PREVIEW_SEEDS) * nfe
        if self.teacher.stochastic:
            report += VARIANCE * visit_nfe(self.teacher, self._cost)
        reports = -(-loop.iterations // loop.iterations_per_tick) - done // loop.iterations_per_tick
        return Work(forward + reports * report, left * inserted, disk)

    def portion(self, model: Model, here: World) -> SeededBatch:
        """As many samples as a process takes through the network at once, for timing."""
        return self._data(model, here).draw(range(_loop(self.options, here).micro))

    def run(self, here: World) -> Path:
        """Train, or continue an earlier run; returns the run's folder."""
        options = self.options
        if options.batch < here.size:
            raise UserError(
                f"--batch={options.batch} leaves some of {here.size} processes without work; "
                f"give --batch {here.size} or more"
            )
        if here.is_main:
            check_writable(options.outdir, "--outdir")
        torch.backends.cudnn.benchmark = options.bench
        model = options.model.load(here)
        record, loop = self.record(model.sha256), _loop(options, here)
        folder = open_run(options.outdir, options.resume, self.name, record, here)
        with claimed(folder, here):
            if here.is_main and is_longer(record, RunRecord.read(folder / RECORD)):
                record.write(folder / RECORD)
            self._train(model, record, loop, folder, here)
        return folder

    def _train(
        self, model: Model, record: RunRecord, loop: Loop, folder: Path, here: World
    ) -> None:
        if is_finished(folder, loop):
            note(f"already trained: {folder}")
            return
        work = self.work(model.sha256, updates_done(folder))
        announce(work, lambda: self.portion(model, here), here)
        predictor = self.predictor().to(here.device, self.options.model.state_dtype)
        batches, preview = self._batches(model, here), self._preview(model, here)
        train(predictor, self.student, batches, loop, here, folder, record, preview)

    def _batches(self, model: Model, here: World) -> Batches:
        if self.stored is None:
            return TaughtBatches(self._data(model, here), self.teacher)
        found = self.stored.run(here, model)
        return StoredBatches(self.stored, model, found, self.student.ts, here)

    def _data(self, model: Model, here: World) -> Data:
        return Data(
            bind=lambda noise, stream: self.conditions.bind(model, noise, here.device, stream),
            card=model.card,
            seed=self.options.seed,
            dtype=self.options.model.state_dtype,
            device=here.device,
        )

    def _preview(self, model: Model, here: World) -> Preview:
        """A function that samples a few fixed seeds with the student, for TensorBoard."""
        student, dtype = self.student, self.options.model.state_dtype

        @torch.no_grad()
        def preview(predictor: AMEDPredictor) -> Tensor:
            noise = SeedNoise(PREVIEW_SEEDS)
            meter = Meter(self.conditions.bind(model, noise, here.device, ("preview",)))
            x = SeededBatch(model.card, noise, meter, dtype, here.device).start(student.ts[0])
            walk = integrate(student.solver, meter, x, student.ts, predictor, student.afs)
            return model.decode(walk.x[-1])

        return preview


def prepare(options: TrainOptions) -> TrainingJob:
    """Resolve every option.

    Raises UserError or ValueError, in one sentence, for invalid or contradictory options.
    """
    check_options(options)
    card = options.model.card()
    conditions = options.conditions.resolve(card)
    settings = _settings(options, card)
    grid = settings.grid.resolve(card)
    fine, stride = grid.refined(settings.M)
    restart = _restart(options, card)
    teacher = build_teacher(
        settings.sampler_tea,
        fine,
        stride,
        solver=settings.teacher_solver(),
        restart=restart,
        histories=settings.solver().kept_nodes > 0,
        shares=True,
    )
    student = Student(settings.solver(), grid.nodes(), settings.afs)
    _warn_if_equal_to_heun(teacher, student)
    stored = _stored(options, settings, teacher, restart)
    return TrainingJob(options, card, conditions, settings, student, teacher, restart, stored)


def _stored(
    options: TrainOptions, settings: StudentSettings, teacher: Teacher, restart: RestartSupervision
) -> TrajectoryJob | None:
    """The trajectories of ``--trajectories``; of other teachers than Restart those of NS solvers.

    Restart's states at two nodes need not lie on one solution of the ODE, so nothing can be
    interpolated, and they are kept on the student's own grid.
    """
    if options.trajectories is None:
        return None
    common = TrajectoryOptions(
        model=options.model,
        conditions=options.conditions,
        teacher=options.sampler_tea,
        seed=options.seed,
        number=options.trajectories,
        keep="all",
    )
    if isinstance(teacher, RestartTeacher):
        common = replace(
            common,
            num_steps=len(teacher.fine),
            schedule_type=settings.schedule_type,
            schedule_rho=settings.schedule_rho,
            restart_info=interval_json(restart.intervals),
            keep=str(teacher.stride),
        )
    return prepare_trajectories(common)


def _restart(options: TrainOptions, card: Card) -> RestartSupervision:
    if options.sampler_tea != "restart":
        return RestartSupervision(())
    _, intervals = resolve_intervals(options.restart_info, card)
    settings = {"target": options.restart_target, "S_noise": options.S_noise}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    return RestartSupervision(intervals, **given)


def _warn_if_equal_to_heun(teacher: Teacher, student: Student) -> None:
    """Print a note if a Restart teacher gives the same targets as Heun."""
    if isinstance(teacher, RestartTeacher) and teacher.flow and not teacher.changes_starts:
        note(
            "note: with --restart_target=flow this Restart teacher gives the same targets as a "
            "Heun teacher, because it restarts below the start of every interval; give "
            f"--restart_info a t_max above {float(student.ts[-2]):.3g}, or use "
            "--restart_target=trajectory"
        )


def _settings(options: TrainOptions, card: Card) -> StudentSettings:
    schedule = options.schedule_type or card.default_schedule
    grid = Grid(schedule, options.num_steps, options.schedule_rho).resolve(card)
    sigma_min, sigma_max = grid.ends
    given = {name: value for name, value in flat_options(options).items() if value is not None}
    resolved = given | {"schedule_type": schedule, "schedule_rho": grid.rho}
    return StudentSettings.from_options(resolved | {"sigma_min": sigma_min, "sigma_max": sigma_max})


def _loop(options: TrainOptions, here: World) -> Loop:
    share = here.share(options.batch)
    return Loop(
        total=math.ceil(options.total_kimg * 1000),
        batch=options.batch,
        micro=min(options.batch_gpu or share, share),
        tick=round(options.tick * 1000),
        snap=options.snap,
        lr=options.lr,
    )
