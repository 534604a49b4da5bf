"""Training runs of NS solvers: options, the resolved job, and its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from amed.resume import open_run
from checkpoints.states import read_state
from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from denoisers.speed import Work, announce
from ns.calibrate import Latents
from ns.coordinates import WhitenedTable
from ns.experiments import TABLE, save_table
from ns.losses import (
    EnergyDistance,
    Loss,
    feature_distance,
    pseudo_huber,
    spectral,
)
from ns.options import NsOptions, check_options
from ns.refine import SAVED, STATE, Pair, Pairs, RefineLoop, refine
from ns.search import calibrated, final_error, polynomial_times, search_times
from ns.spectrum import SpectralNorm
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import note, progress
from runtime.options import Json, flat_options
from runtime.outputs import check_writable, claimed
from runtime.record import RunRecord
from solvers.table import Table
from teachers.curves import Curves
from teachers.trajectories import TrajectoryJob, TrajectoryOptions
from teachers.trajectories import prepare as prepare_trajectories
from teachers.trajectory_files import TrajectorySet

UNPAIRED = 512  #: images of Restart that the energy distance compares with
JUDGED = 64  #: latents that tables are compared on, never fitted: the first numbers, at most
CALIBRATED = 256  #: latents of the closed form, the next numbers, at most
SEARCHED = (96, 64)  #: latents of the search: fitted and judged on, among the calibrated ones
SHARE = 32  #: latents in a batch of the calibration, in each process, at most
LEAST = 4  #: latents of the closed form for each process


class Split(NamedTuple):
    """How many latents do what; fewer than usual where a run has few trajectories."""

    judged: int
    calibrated: int
    searched: tuple[int, int]

    @classmethod
    def of(cls, trajectories: int) -> Split:
        calibrated, searched = min(CALIBRATED, trajectories), SEARCHED
        if calibrated < sum(SEARCHED):
            searched = calibrated // 2, calibrated // 2
        return cls(min(JUDGED, trajectories), calibrated, searched)


@dataclass(frozen=True)
class NsJob:
    """A resolved training run; nothing has been loaded or written yet."""

    options: NsOptions
    card: Card
    conditions: Conditions
    curves: TrajectoryJob  #: teacher trajectories at all nodes, for the closed form
    pairs: TrajectoryJob  #: latents and images, for the refinement; ``curves`` if they suffice
    unpaired: TrajectoryJob | None  #: images of Restart

    @property
    def split(self) -> Split:
        return Split.of(self.options.trajectories)

    @property
    def calls(self) -> int:
        """Network calls of the student."""
        return self.options.nfe // self.card.cost(self.conditions.guidance_rate)

    @property
    def name(self) -> str:
        """The name of the folder, without its number."""
        options = self.options
        parts = (self.card.name, self.calls, options.nfe, "ns", options.sampler_tea, options.desc)
        return "-".join(str(part) for part in parts if part is not None)

    def record(self, weights_sha256: str | None) -> RunRecord:
        """Every resolved option, the model, and the plan of student and teacher."""
        resolved: dict[str, Json] = {
            **flat_options(self.options),
            "dataset_name": self.card.name,
            "sampler_stu": "ns",
            "exponent": self.options.norm_exponent,
            "prompts": self.conditions.describe(),
        }
        resolved.pop("resume")  # no option of training itself
        refined = self.pairs.options.number if self.options.refine else 0
        plan: dict[str, Json] = {
            "nfe": self.options.nfe,
            "calls": self.calls,
            "numbers": self.calls + (self.calls + 1) * (self.calls + 2) // 2,
            "teacher_nfe": self.curves.nfe,
            "latents": max(self.curves.options.number, refined),
        }
        return RunRecord.make(
            "train", resolved, {"name": self.card.name, "sha256": weights_sha256}, plan
        )

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.options.model.known_sha256).to_json()

    @property
    def source(self) -> ModelSource:
        return self.options.model

    def work(self, weights_sha256: str | None, done: int = 0) -> Work:
        """What is left after ``done`` updates of the refinement."""
        options, nfe, split = self.options, self.options.nfe, self.split
        sets = [self.curves]
        sets += [self.pairs] if self.pairs.options != self.curves.options else []
        sets += [self.unpaired] if self.unpaired else []
        missing = [(job, job.missing(weights_sha256)) for job in sets]
        forward = sum(count * (job.nfe or 0) for job, count in missing)
        if not done:
            tables = options.calibrations * sum(split.searched) + split.calibrated + split.judged
            forward += tables * nfe
        left = options.refine - done
        gradients = left * options.batch * nfe
        forward += -(-left // options.report) * split.judged * nfe
        forward += gradients if options.checkpoint else 0
        disk = sum(count * job.bytes_per_latent for job, count in missing)
        return Work(forward, gradients, disk)

    def portion(self, model: Model, here: World) -> SeededBatch:
        """As many latents as a process takes through the network at once, for timing."""
        return self.curves.draw(model, range(self._micro(here)), here)

    def _micro(self, here: World) -> int:
        share = here.share(self.options.batch)
        return min(self.options.batch_gpu or share, share)

    def run(self, here: World) -> Path:
        """Search, calibrate and refine, or continue an earlier run; returns the run's folder."""
        options = self.options
        if self.split.calibrated < LEAST * here.size:
            raise UserError(
                f"--trajectories {options.trajectories} are too few for {here.size} process(es): "
                f"give {LEAST * here.size} or more"
            )
        if here.is_main:
            check_writable(options.outdir, "--outdir")
        model = options.model.load(here)
        record = self.record(model.sha256)
        folder = open_run(options.outdir, options.resume, self.name, record, here)
        with claimed(folder, here):
            self._train(model, record, folder, here)
        here.barrier()  # every process may read the table now
        return folder

    def _train(self, model: Model, record: RunRecord, folder: Path, here: World) -> None:
        options = self.options
        state = read_state(folder / STATE, SAVED)
        if (folder / TABLE).exists() and state.get("done", 0) >= options.refine:
            note(f"already trained: {folder}")
            return
        work = self.work(model.sha256, state.get("done", 0))
        announce(work, lambda: self.portion(model, here), here)
        fit, judge = self.latents(model, here)
        images = [curves.images for curves in fit.curves]
        norm = SpectralNorm.of(images, self.options.norm_exponent, here.sum_)
        loss = self._loss(model, norm, here)

        def error(table: Table) -> float:
            return final_error(table, judge, loss, here.sum_)

        start = self._calibrate(state, fit, norm, here)

        def save(table: Table) -> None:
            save_table(folder / TABLE, table, record)

        if options.refine == 0:
            note(f"calibrated: held out {error(start.table()):.5f}")
            if here.is_main:
                save(start.table())
            return
        pairs = self._pairs(model, self.pairs.run(here, model), here)
        numbers = range(self.split.judged, self.split.judged + options.trajectories)
        loop = RefineLoop(
            options.refine,
            options.batch,
            options.report,
            options.lr,
            options.checkpoint,
            options.seed,
        )
        refine(start, pairs, numbers, error, loss, loop, folder, here, save)

    def latents(self, model: Model, here: World) -> tuple[Latents, Latents]:
        """This process's latents for the closed form, and those that tables are judged on."""
        stored = self.curves.run(here, model)
        judged, calibrated, _ = self.split
        first = range(judged, judged + calibrated)
        return (
            self._read(model, stored, first, here),
            self._read(model, stored, range(judged), here),
        )

    def _read(
        self, model: Model, stored: TrajectorySet, numbers: Sequence[int], here: World
    ) -> Latents:
        curves, meters = [], []
        for batch in stored.batches(self._share(here), here.shard(numbers)):
            curves.append(Curves(stored.times, batch.x, batch.x0, here.device))
            meters.append(self.curves.draw(model, batch.numbers, here).meter)
        return Latents(curves, meters, self.card.is_flow)

    def _share(self, here: World) -> int:
        """Latents in a batch: one that divides those of the search among all processes."""
        each = math.gcd(*self.split.searched) // here.size
        return max((n for n in range(1, SHARE + 1) if each and each % n == 0), default=1)

    def _calibrate(
        self, state: dict[str, Any], fit: Latents, norm: SpectralNorm, here: World
    ) -> WhitenedTable:
        """The coordinates around the calibrated table; those of the run to continue, if any."""
        if not state:
            times = self._times(fit, norm, here)
            return WhitenedTable.around(calibrated(times, fit, norm, here.sum_), fit.flow)
        levels, saved = fit.curves[0].times, state["current"]
        table = Table(float(levels[0]), 0.0, saved["times"], saved["rows"])
        return WhitenedTable(table, saved["directions"], fit.flow)

    def _times(self, fit: Latents, norm: SpectralNorm, here: World) -> list[float]:
        levels = fit.curves[0].times
        if self.options.times is not None:
            return [*self.options.times[1:-1]]
        total = self.options.calibrations
        if not total:
            return polynomial_times(self.calls, float(levels[-1]), float(levels[0]))
        share = self._share(here) * here.size
        batches = [-(-count // share) for count in self.split.searched]
        ends = batches[0], sum(batches)
        some = fit.part(0, ends[0])
        other = fit.part(ends[0], ends[1])
        with progress(total, "searching", "tables", enabled=here.is_main) as bar:

            def watch(error: float) -> None:
                bar.update(1)
                bar.set_postfix(error=f"{error:.4f}")

            return search_times(self.calls, some, other, norm, total, here.sum_, watch)

    def _loss(self, model: Model, norm: SpectralNorm, here: World) -> Loss:
        losses: dict[str, Loss] = {
            "spectral": spectral(norm),
            "l2": spectral(norm),  # whose exponent is 0
            "huber": pseudo_huber,
            "features": feature_distance,
        }
        pairs = losses[self.options.loss]
        if self.unpaired is None:
            return pairs
        stored = self.unpaired.run(here, model)
        images = (batch.x0[-1].to(here.device) for batch in stored.batches(SHARE))
        return EnergyDistance.to(images, pairs, self.options.unpaired)

    def _pairs(self, model: Model, stored: TrajectorySet, here: World) -> Pairs:
        micro = self._micro(here)

        def pairs(numbers: Sequence[int]) -> Iterator[Pair]:
            for batch in stored.batches(micro, numbers):
                denoiser = self.pairs.draw(model, batch.numbers, here).denoiser
                yield Pair(batch.x[0].to(here.device), batch.x0[-1].to(here.device), denoiser)

        return pairs


def prepare(options: NsOptions) -> NsJob:
    """Resolve every option.

    Raises UserError or ValueError, in one sentence, for invalid or contradictory options.
    """
    card = options.model.card()
    conditions = options.conditions.resolve(card)
    cost = card.cost(conditions.guidance_rate)
    if options.nfe % cost:
        raise UserError(
            f"--nfe {options.nfe} is odd, but guidance takes {cost} evaluations per call: give "
            f"--nfe {options.nfe + 1}"
        )
    check_options(options, options.nfe // cost, card)
    common = TrajectoryOptions(
        model=options.model,
        conditions=options.conditions,
        teacher=options.sampler_tea,
        seed=options.seed,
    )
    judged, calibrated, _ = Split.of(options.trajectories)
    curves = pairs = replace(common, number=judged + calibrated, keep="all")
    if options.trajectories > calibrated:
        pairs = replace(common, number=judged + options.trajectories, keep="ends")
    jobs = prepare_trajectories(curves), prepare_trajectories(pairs)
    unpaired = None
    if options.unpaired:
        other = replace(common, teacher="restart", seed=options.seed + 1, number=UNPAIRED)
        unpaired = prepare_trajectories(other)
    return NsJob(options, card, conditions, *jobs, unpaired)
