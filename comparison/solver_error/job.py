"""Solver errors: from resolved options to what is held against which exact solutions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comparison.job import numbers
from comparison.rows import (
    Row,
    ceiling_rows,
    classic_rows,
    distinct,
    learned_rows,
    load_students,
)
from comparison.solver_error.exact import Exact, Problem
from comparison.solver_error.walks import level, times, walks
from denoisers.precision import DTYPES
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from metrics.detectors import Detector
from runtime.dist import World
from runtime.images import to_uint8
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from samplers.build import build
from samplers.options import SamplerOptions
from solvers.grids import get_grid

CURVE = 33  #: points of a trajectory that its plane is fitted to, on the usual polynomial grid
CHECK = 200  #: nodes of the Heun walk that checks the exact solutions
STOCHASTIC = "it draws noise on the way, so a path of its has no exact counterpart"


@dataclass(frozen=True)
class SolverErrorJob:
    """What is to be held against the exact solutions; nothing has been written yet."""

    rows: dict[str, tuple[Row, Exact]]  #: by key
    skipped: list[dict[str, str]]
    detector: Detector | None
    seeds: list[int]
    batch: int  #: images that are solved together
    folder: Path
    world: World
    record: RunRecord

    @property
    def groups(self) -> list[list[int]]:
        """The seeds as they are solved together: the same on any number of processes."""
        return [self.seeds[i : i + self.batch] for i in range(0, len(self.seeds), self.batch)]

    @property
    def mine(self) -> Sequence[tuple[int, list[int]]]:
        """This process's groups with the place of their first seed."""
        return self.world.shard([(i * self.batch, g) for i, g in enumerate(self.groups)])

    def finished(self, place: int) -> int:
        """Images of all processes in the time that this one took for its group at ``place``."""
        size = self.world.size
        first = place // self.batch // size * size
        return sum(map(len, self.groups[first : first + size]))

    @property
    def exacts(self) -> list[Exact]:
        """The different problems, nearly always one; each once."""
        return list(dict.fromkeys(exact for _, exact in self.rows.values()))

    def features(self, x: Tensor, model: Model) -> Tensor | None:
        """Of final states (B, C, H, W): (B, dim)."""
        if self.detector is None:
            return None
        pixels = torch.from_numpy(to_uint8(model.decode(x)))
        return self.detector(pixels.permute(0, 3, 1, 2)).cpu().double()

    def gather(self, columns: Iterator[tuple[int, Tensor]], height: int) -> Tensor:
        """(height, images) from the columns (height, B) of all processes, by their place."""
        whole = torch.zeros(height, len(self.seeds), dtype=torch.float64)
        for place, part in columns:
            whole[:, place : place + part.shape[1]] = part
        return self.world.sum_(whole)

    def outline(self) -> str:
        """What would be run, in words: for a dry run."""
        lines = [self.record.to_json()]
        lines += [
            f"{row.sampler.nfe} NFE: {row.method}, {row.detail}" for row, _ in self.rows.values()
        ]
        return "\n".join([*lines, *(f"left out: {s['method']}: {s['why']}" for s in self.skipped)])


def prepare(options: Mapping[str, Any], world: World, detector: Detector | None) -> SolverErrorJob:
    """Load everything and lay out the rows.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = parse_seeds(options["seeds"])
    budgets = numbers("--budgets", options["budgets"], 1)
    model = ModelSource.from_options(options).load(options["dtype"], world)
    card = model.card
    specs = [s for s in options["predictors"].split(",") if s]
    students = load_students(specs, card, "exps", world.device)
    rows = [
        row
        for b in sorted({*budgets, *(s.settings.nfe() for s in students)})
        for row in (classic_rows(b, card, options["schedule_type"]) if b in budgets else [])
        + learned_rows(b, students, card)
    ]
    rows += ceiling_rows(card) if options["ceilings"] else []
    if options["check"]:
        fine = build(SamplerOptions(sampler="edm", num_steps=CHECK), card)
        rows.append(Row(f"Heun-{fine.nfe}", "ceiling", None, fine, f"{CHECK} nodes and 0"))
    dtype = torch.promote_types(DTYPES[options["dtype"]], torch.float32)
    placed, skipped = lay_out(
        distinct(rows), model, options["tol"], dtype, options["outdir"], world
    )
    if detector is not None:  # whether it takes images of this size, before any work
        with torch.inference_mode():
            images = model.decode(torch.zeros(1, *card.shape, dtype=dtype, device=world.device))
            detector(torch.zeros(images.shape, dtype=torch.uint8))
    record = RunRecord.make(
        "solver_error",
        {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        {"name": card.name, "sha256": model.sha256},
        {
            "budgets": budgets,
            "predictors": [s.name for s in students],
            "nfe": {key: row.sampler.nfe for key, (row, _) in placed.items()},
            "device": str(world.device),
        },
    )
    batch, folder = options["batch"], options["outdir"]
    return SolverErrorJob(placed, skipped, detector, seeds, batch, folder, world, record)


def lay_out(
    rows: Sequence[Row], model: Model, tol: float, dtype: torch.dtype, folder: Path, world: World
) -> tuple[dict[str, tuple[Row, Exact]], list[dict[str, str]]]:
    """Each row with the exact solutions that it is held against, and the rows that have none."""
    solved, skipped = [], []
    for row in rows:
        if walks(row.sampler) is None:
            skipped.append({"method": row.method, "why": STOCHASTIC})
        else:
            solved.append(row)
    problems: dict[tuple[float | None, float], list[Row]] = {}
    for row in solved:
        key = row.sampler.guidance_rate, level(row.sampler.start)
        problems.setdefault(key, []).append(row)
    placed = {}
    for (rate, begin), sharing in problems.items():
        levels = {t for row in sharing for t in times(walks(row.sampler) or [])}
        levels |= set(curve(levels))
        problem = Problem(model, rate, begin, dtype, world.device)
        exact = Exact(problem, tol, tuple(sorted(levels, reverse=True)), folder / "exact")
        placed.update({id(row): exact for row in sharing})
    return {row.key: (row, placed[id(row)]) for row in solved}, skipped


def curve(levels: Collection[float]) -> list[float]:
    """The points of a trajectory: EDM's grid between the ends of ``levels``, 0 aside."""
    ends = min(t for t in levels if t > 0), max(levels)
    return [level(t) for t in get_grid("polynomial", CURVE, *ends, rho=7.0)]
