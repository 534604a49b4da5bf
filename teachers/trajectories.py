"""Computing a teacher's trajectories once, for every student that reads them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from restart.intervals import Interval, interval_values, resolve_intervals
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, remove_leftovers, sha256_file
from runtime.log import note, progress
from runtime.options import Json, flat_options
from runtime.record import RECORD, RunRecord
from solvers.grids import Grid, check_exponent
from teachers.build import RestartSupervision, build_teacher
from teachers.supervision import GridTeacher
from teachers.trajectory_files import (
    SHARD,
    TRAJECTORIES,
    Shard,
    StoredRow,
    TrajectorySet,
    shards,
    stream_name,
)
from teachers.walks import TeacherWalk, WalkStates

STORED = {"float32": torch.float32, "float16": torch.float16}
TOL = 1e-5
#: Options that the states do not depend on.
FREE = ("number", "batch", "cache_dir")


@dataclass(frozen=True)
class TrajectoryOptions:
    """The options of ``python -m tools.trajectories``, named like its flags."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    teacher: str = "heun"
    num_steps: int = 18  #: nodes of the teacher's grid, from sigma_max to sigma_min
    schedule_type: str = "polynomial"
    schedule_rho: float | None = None
    restart_info: str | None = None
    tol: float | None = None  #: of dopri5, relative and absolute; None means `TOL`
    number: int = 512  #: latents
    seed: int = 0
    keep: str = "ends"  #: states at both ends of the grid, at "all" nodes, or at every K-th one
    store: str = "float32"  #: dtype of the states on disk, a key of `STORED`
    batch: int = 64  #: latents at once, over all processes


@dataclass(frozen=True, eq=False)
class TrajectoryJob:
    """Trajectories that will be computed; nothing has been loaded or written yet."""

    options: TrajectoryOptions
    card: Card
    conditions: Conditions
    walk: TeacherWalk
    intervals: tuple[Interval, ...]  #: of a Restart teacher

    @property
    def nfe(self) -> int | None:
        """Planned network evaluations per latent; None for dopri5."""
        return self.walk.nfe(self.card.cost(self.options.conditions.guidance_rate))

    @property
    def bytes_per_latent(self) -> int:
        """On disk, without the headers of the files."""
        values = 2 * len(self.walk.times) * math.prod(self.card.shape)
        return values * STORED[self.options.store].itemsize + 8  # its NFE

    def record(self, weights_sha256: str | None) -> RunRecord:
        """The record of the folder; model and plan are all that the states depend on."""
        options, teacher = self.options, self.walk.teacher
        given = {k: v for k, v in flat_options(options).items() if k not in FREE}
        companion = options.model.companion_path
        plan: dict[str, Json] = {
            "teacher": options.teacher,
            "solver": repr(teacher.solver) if isinstance(teacher, GridTeacher) else None,
            "tol": self.tol,
            "restart_info": interval_values(self.intervals) or None,
            # rounded, because powers may differ in the last bit between machines
            "nodes": [float(f"{t:.12g}") for t in self.walk.nodes.tolist()],
            "nfe": self.nfe,
            "keep": options.keep,
            "store": options.store,
            "dtype": options.model.dtype,
            "seed": options.seed,
            "class": self.conditions.label,
            "prompts": self.conditions.describe(),
            "guidance_rate": self.conditions.guidance_rate,
            "companion": sha256_file(companion) if companion else None,
            "shard": SHARD,
        }
        model = {"name": self.card.name, "sha256": weights_sha256}
        return RunRecord.make(TRAJECTORIES, given, model, plan)

    @property
    def tol(self) -> float | None:
        """The tolerance of dopri5; None for other teachers."""
        return (self.options.tol or TOL) if self.options.teacher == "dopri5" else None

    def outline(self) -> str:
        """The record and the size on disk, for a dry run."""
        number, each = self.options.number, self.bytes_per_latent
        nfe = "adaptive NFE" if self.nfe is None else f"{self.nfe} NFE each"
        size = f"{each} bytes each, {number * each / 1e6:.1f} MB in all"
        record = self.record(self.options.model.known_sha256)
        return f"{record.to_json()}\n{number} trajectories, {nfe}, {size}"

    def folder(self, record: RunRecord) -> Path:
        """Where the trajectories of this record lie: named by a hash of its model and plan."""
        identity = json.dumps([record.model, record.plan], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return cache_folder(self.options.model.cache_dir) / TRAJECTORIES / key

    def missing(self, weights_sha256: str | None) -> int:
        """How many of the trajectories are not on disk; nothing is written."""
        return sum(
            len(numbers) for _, numbers in self._todo(self.folder(self.record(weights_sha256)))
        )

    def run(self, here: World, model: Model | None = None) -> TrajectorySet:
        """Compute the trajectories that are not on disk yet, on all processes.

        ``model`` is the job's model if it is loaded already.
        """
        model = model or self.options.model.load(here)
        record = self.record(model.sha256)
        folder, number = self.folder(record), self.options.number
        todo = here.broadcast_object(self._open(folder, record) if here.is_main else [])
        missing = sum(len(numbers) for _, numbers in todo)
        if missing:
            with progress(missing, self.options.teacher, "traj", enabled=here.is_main) as bar:
                self._compute(model, here.shard(todo), here, bar)
        note(f"{missing} trajectories computed, {number - missing} were there already")
        here.barrier()
        return TrajectorySet.open(folder, number)

    def draw(self, model: Model, numbers: Sequence[int], here: World) -> SeededBatch:
        """The latents of these numbers, with their class or prompt and the noise of jumps."""
        dtype, stream = self.options.model.state_dtype, stream_name(self.options.seed)
        return SeededBatch.open(model, self.conditions, numbers, dtype, here.device, stream)

    @torch.inference_mode()
    def states(self, model: Model, numbers: Sequence[int], here: World) -> WalkStates:
        """The teacher's states for the latents of these numbers, which are not stored.

        Raises RuntimeError if the metered NFE is not the planned one.
        """
        drawn = self.draw(model, numbers, here)
        made = self.walk.run(drawn.denoiser, drawn.start(self.walk.nodes[0]), drawn.process)
        if self.nfe not in (None, made.nfe):
            raise RuntimeError(
                f"{self.options.teacher} used {made.nfe} NFE instead of the planned {self.nfe}: "
                "this is a bug in TeacherWalk.nfe"
            )
        return made

    def _open(self, folder: Path, record: RunRecord) -> list[tuple[Shard, range]]:
        """Write the record if there is none; the shards that lack latents, and their numbers."""
        remove_leftovers(folder)
        if (folder / RECORD).exists():
            RunRecord.read(folder / RECORD)  # a damaged one is an error now, not after the work
        else:
            record.write(folder / RECORD)
        return self._todo(folder)

    def _todo(self, folder: Path) -> list[tuple[Shard, range]]:
        """The shards that lack latents, and their numbers."""
        todo = []
        for shard in shards(folder, self.options.number):
            first = shard.first + shard.count()
            last = min(shard.first + SHARD, self.options.number)
            if first < last:
                todo.append((shard, range(first, last)))
        return todo

    def _compute(
        self, model: Model, todo: Sequence[tuple[Shard, range]], here: World, bar: tqdm
    ) -> None:
        """Fill these shards, one after the other; batches may reach from one into the next."""
        rows = self._rows(model, [n for _, numbers in todo for n in numbers], here, bar)
        for shard, numbers in todo:
            shard.extend(numbers, list(islice(rows, len(numbers))), self.walk.times)

    def _rows(
        self, model: Model, numbers: Sequence[int], here: World, bar: tqdm
    ) -> Iterator[StoredRow]:
        share, store = here.share(self.options.batch), self.options.store
        for i in range(0, len(numbers), share):
            some = numbers[i : i + share]
            made = self.states(model, some, here)
            bar.update(min(len(some) * here.size, bar.total - bar.n))
            x, x0 = (part.to("cpu", STORED[store]) for part in (made.x, made.x0))
            if not bool(x.isfinite().all() & x0.isfinite().all()):
                raise UserError(
                    f"the states of the latents {some[0]} to {some[-1]} are not all finite in "
                    f"{store}: give --store float32, and another --dtype or grid if that fails too"
                )
            for pair in zip(x.unbind(1), x0.unbind(1), strict=True):
                yield StoredRow(*pair, made.nfe)


def prepare(options: TrajectoryOptions) -> TrajectoryJob:
    """Resolve everything that can be wrong before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    _check(options)
    check_exponent(options.schedule_type, options.schedule_rho)
    card = options.model.card()
    conditions = options.conditions.resolve(card)
    grid = Grid(options.schedule_type, options.num_steps, options.schedule_rho).resolve(card)
    nodes, stride = grid.nodes(), _stride(options)
    intervals: tuple[Interval, ...] = ()
    if options.teacher == "restart":
        stated, intervals = resolve_intervals(options.restart_info, card)
        if stated not in (None, options.num_steps):
            raise UserError(
                f"--num_steps {options.num_steps} contradicts the {stated} main nodes in "
                f"--restart_info: give --num_steps {stated}, or no main nodes"
            )
    teacher = build_teacher(
        options.teacher,
        nodes,
        stride,
        restart=RestartSupervision(intervals, target="trajectory"),
        tol=options.tol or TOL,
    )
    return TrajectoryJob(options, card, conditions, TeacherWalk(teacher, nodes, stride), intervals)


def _stride(options: TrajectoryOptions) -> int:
    """Nodes from one kept state to the next."""
    keep, intervals = options.keep, options.num_steps - 1
    if keep in ("ends", "all"):
        return intervals if keep == "ends" else 1
    number = int(keep) if keep.isdecimal() and len(keep) < 10 else 0
    if number < 1 or intervals % number:
        raise UserError(
            f"--keep {keep[:20]} does not lead to the last of {options.num_steps} nodes: give "
            f"ends, all, or a divisor of {intervals}"
        )
    return number


def _check(options: TrajectoryOptions) -> None:
    """Raise UserError for a value out of range, and for an option of another teacher."""
    for name, value, least in (
        ("number", options.number, 1),
        ("batch", options.batch, 1),
        ("seed", options.seed, 0),
    ):
        if value < least:
            raise UserError(f"--{name} {value} is too small: give --{name} {least} or more")
    if options.store not in STORED:
        raise UserError(f"--store {options.store} is unknown: choose {' or '.join(STORED)}")
    if options.tol is not None and not 0 < options.tol < math.inf:
        raise UserError(f"--tol {options.tol} is no tolerance: give a positive number")
    for name, given, owner in (
        ("tol", options.tol, "dopri5"),
        ("restart_info", options.restart_info, "restart"),
    ):
        if given is not None and options.teacher != owner:
            raise UserError(
                f"--{name} {given} is not an option of the teacher {options.teacher}: leave it "
                f"out, or give --teacher {owner}"
            )
