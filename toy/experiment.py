"""The experiment: settings, measurements and results; an interrupted run can be continued."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from runtime.dist import World
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.log import progress
from runtime.options import Json
from runtime.outputs import claimed
from runtime.record import RECORD, RunRecord
from runtime.typed import read_earlier, to_plain, write_result
from solvers.types import Denoiser
from toy.data import Mixture, point_denoiser
from toy.distances import Cloud, PathErrors, wasserstein1
from toy.network import STATE, recipe, train_network
from toy.processes import FAMILIES, Levels, SamplerSettings, candidates

COMMAND = "toy"  #: of the record
MIN_BLOCKS = 2  #: needed for a standard deviation


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.  Raises UserError for invalid values."""

    budgets: tuple[int, ...] = (23, 31, 39)  #: evaluations per point
    points: int = 2000  #: points in the data set, and in every cloud
    choosing: int = 3  #: clouds for selecting processes
    blocks: int = 8  #: other clouds, for the reported errors
    kimg: float = 1000.0  #: thousands of training points
    batch: int = 512
    width: int = 64
    seed: int = 0  #: seed of the network
    mixture: Mixture = field(default_factory=Mixture)
    levels: Levels = field(default_factory=Levels)

    def __post_init__(self) -> None:
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise UserError(f"budgets {self.budgets}: give one or more different numbers")
        if min(self.blocks, self.choosing) < MIN_BLOCKS or self.points < 2:
            raise UserError(
                f"points = {self.points}, blocks = {self.blocks}, choosing = {self.choosing}: "
                f"give 2 or more points and {MIN_BLOCKS} or more for the other two"
            )
        recipe(self.kimg, self.batch, self.seed)  # raises for invalid values


@dataclass(frozen=True)
class Point:
    """The errors of a candidate on one block."""

    family: str
    label: str
    nfe: int
    block: int  #: the first ``choosing`` blocks are for selecting, the others are reported
    total: float
    contracted: float
    additional: float


@dataclass(frozen=True)
class MeasuredPoint:
    """The content of a file in ``points/``."""

    identity: Mapping[str, object]  #: of the bench that measured it
    point: Point


@dataclass(frozen=True)
class Results:
    """The measured errors."""

    swept: list[Point]  #: every candidate of every budget, on the blocks for selecting
    chosen: list[Point]  #: the best candidate of each family and budget, on the other blocks
    floor: list[float]  #: W1 from a new sample of the mixture to the data, per reported block
    record: RunRecord


class Bench:
    """Measures candidates on blocks and stores every point in a file.

    The constructor trains the network, unless ``folder`` has it already.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.data = settings.mixture.sample(range(settings.points))
        plan = recipe(settings.kimg, settings.batch, settings.seed)
        self.denoiser: Denoiser = train_network(folder, self.data, settings.width, plan)
        #: points with other values are measured again
        self.identity: dict[str, Json] = {
            "network_sha256": sha256_file(folder / STATE),
            "points": settings.points,
            "mixture": to_plain(settings.mixture),
            "levels": to_plain(settings.levels),
        }
        self._clouds: dict[int, Cloud] = {}

    def measure(self, candidate: SamplerSettings, block: int) -> Point:
        """The three errors of ``candidate``, from the file of an earlier run if there is one."""
        nfe = candidate.process.nfe
        name = re.sub(r"[^\w.]+", "-", f"{block} {nfe} {candidate.label}")
        file = self.folder / "points" / f"{name}.json"
        earlier = read_earlier(MeasuredPoint, file)
        if earlier is not None and earlier.identity == self.identity:
            return earlier.point
        with torch.inference_mode():
            errors: PathErrors = self._cloud(block).errors(candidate.process, self.denoiser)
        point = Point(candidate.family, candidate.label, nfe, block, *errors)
        write_result(file, MeasuredPoint(self.identity, point))
        return point

    def floor(self, block: int) -> float:
        """W1 from new points of the mixture to the data: the error of a perfect sampler."""
        n = self.settings.points
        sample = self.settings.mixture.sample(range(n * block, n * (block + 1)))
        return wasserstein1(sample, self.data)

    def _cloud(self, block: int) -> Cloud:
        if block not in self._clouds:
            levels = self.settings.levels
            ideal = point_denoiser(self.data)
            self._clouds[block] = Cloud.make(
                self.data, ideal, block, levels.sigma_max, levels.t_max
            )
        return self._clouds[block]


def run(settings: Settings, folder: Path) -> Results:
    """Train, measure all candidates, select the best and measure them again.

    Finished work is kept in ``folder``.
    """
    with claimed(folder, World(0, 1, torch.device("cpu")), COMMAND):
        return _run(settings, folder)


def _run(settings: Settings, folder: Path) -> Results:
    by_budget = plans(settings)
    record = RunRecord.make(COMMAND, asdict(settings), {}, outline(by_budget))
    bench = Bench(settings, folder)
    record.write(folder / RECORD)
    blocks = range(settings.choosing, settings.choosing + settings.blocks)
    everything = [c for group in by_budget.values() for c in group]
    total = len(everything) * settings.choosing + len(by_budget) * len(FAMILIES) * len(blocks)
    with progress(total, "measuring", "pt") as bar:

        def measure(pairs: Iterable[tuple[SamplerSettings, int]]) -> list[Point]:
            points = []
            for candidate, block in pairs:
                points.append(bench.measure(candidate, block))
                bar.update()
            return points

        swept = measure((c, block) for block in range(settings.choosing) for c in everything)
        best = list(_best(by_budget, swept))
        chosen = measure((c, block) for block in blocks for c in best)
    return Results(swept, chosen, [bench.floor(block) for block in blocks], record)


def plans(settings: Settings) -> dict[int, list[SamplerSettings]]:
    """The candidates of every budget.  Raises UserError for a budget without candidates."""
    return {budget: candidates(settings.levels, budget) for budget in settings.budgets}


def outline(by_budget: dict[int, list[SamplerSettings]]) -> dict[str, list[str]]:
    """The labels of the candidates of each budget."""
    return {f"{budget} NFE": [c.label for c in group] for budget, group in by_budget.items()}


def _best(
    by_budget: dict[int, list[SamplerSettings]], swept: list[Point]
) -> Iterator[SamplerSettings]:
    """The candidate of each budget and family with the lowest mean total error."""
    totals: dict[tuple[int, str], float] = defaultdict(float)
    for point in swept:
        totals[point.nfe, point.label] += point.total
    for budget, group in by_budget.items():
        for family in FAMILIES:
            members = [c for c in group if c.family == family]
            yield min(members, key=lambda c: totals[budget, c.label])
