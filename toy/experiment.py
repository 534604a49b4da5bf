"""The experiment from its settings to its figures; a killed one goes on where it stopped."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from runtime.errors import UserError
from runtime.files import read_earlier, sha256_file, write_json
from runtime.log import progress
from runtime.record import RunRecord
from solvers.types import Denoiser
from toy.data import Mixture, point_denoiser
from toy.distances import Cloud, PathErrors, wasserstein1
from toy.network import STATE, recipe, trained
from toy.processes import FAMILIES, Levels, SamplerSettings, candidates

LEAST_BLOCKS = 2  #: below this there is no deviation to report


@dataclass(frozen=True)
class Settings:
    """All that the result depends on.  Raises UserError for what makes no experiment."""

    budgets: tuple[int, ...] = (23, 31, 39)  #: evaluations per point
    points: int = 2000  #: in the data set, and in every cloud
    choosing: int = 3  #: clouds that processes are chosen on
    blocks: int = 8  #: others, that the chosen ones are reported on
    kimg: float = 1000.0  #: thousands of points that the network sees
    batch: int = 512
    width: int = 64
    seed: int = 0  #: of the network
    mixture: Mixture = field(default_factory=Mixture)
    levels: Levels = field(default_factory=Levels)

    def __post_init__(self) -> None:
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise UserError(f"budgets {self.budgets}: give one or more numbers, each once")
        if min(self.blocks, self.choosing) < LEAST_BLOCKS or self.points < 2:
            raise UserError(
                f"{self.points} points in {self.blocks} blocks, chosen on {self.choosing} others: "
                f"give 2 or more points and {LEAST_BLOCKS} or more blocks of either kind"
            )
        recipe(self.kimg, self.batch, self.seed)  # says what is wrong with it


@dataclass(frozen=True)
class Point:
    """A candidate, measured on one block."""

    family: str
    label: str
    nfe: int
    block: int  #: the first ``choosing`` are for choosing, the others are reported
    total: float
    contracted: float
    additional: float


@dataclass(frozen=True)
class Results:
    """What was measured."""

    swept: list[Point]  #: every candidate of every budget on the blocks for choosing
    chosen: list[Point]  #: the best of each family and budget by that, on the other blocks
    floor: list[float]  #: W1 of a fresh sample of the mixture to the data, per reported block
    record: RunRecord


class Bench:
    """Measures candidates on blocks; one file a point, so a kill loses one point at most.

    Making one trains the network, unless it lies in ``folder`` already.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.data = settings.mixture.sample(range(settings.points))
        plan = recipe(settings.kimg, settings.batch, settings.seed)
        self.denoiser: Denoiser = trained(folder, self.data, settings.width, plan)
        #: what two points have to share to stand in one figure
        self.identity = {
            "network_sha256": sha256_file(folder / STATE),
            "points": settings.points,
            "mixture": asdict(settings.mixture),
            "levels": asdict(settings.levels),
        }
        self._clouds: dict[int, Cloud] = {}

    def measure(self, candidate: SamplerSettings, block: int) -> Point:
        """The three errors of ``candidate``, read where the same point was measured before."""
        nfe = candidate.process.nfe
        name = re.sub(r"[^\w.]+", "-", f"{block} {nfe} {candidate.label}")
        file = self.folder / "points" / f"{name}.json"
        found = read_earlier(file)
        if found is not None and found["identity"] == self.identity:
            return Point(**found["point"])
        with torch.inference_mode():
            errors: PathErrors = self._cloud(block).errors(candidate.process, self.denoiser)
        point = Point(candidate.family, candidate.label, nfe, block, *errors)
        write_json(file, {"identity": self.identity, "point": asdict(point)})
        return point

    def floor(self, block: int) -> float:
        """W1 to the data of as many fresh points of the mixture: what a perfect sampler scores."""
        n = self.settings.points
        fresh = self.settings.mixture.sample(range(n * block, n * (block + 1)))
        return wasserstein1(fresh, self.data)

    def _cloud(self, block: int) -> Cloud:
        if block not in self._clouds:
            levels = self.settings.levels
            ideal = point_denoiser(self.data)
            self._clouds[block] = Cloud.make(
                self.data, ideal, block, levels.sigma_max, levels.t_max
            )
        return self._clouds[block]


def run(settings: Settings, folder: Path) -> Results:
    """Train, sweep, choose, measure the chosen; everything that is finished lies in ``folder``."""
    by_budget = plans(settings)
    record = RunRecord.make("toy", asdict(settings), {}, outline(by_budget))
    bench = Bench(settings, folder)
    record.write(folder / "run.json")
    blocks = range(settings.choosing, settings.choosing + settings.blocks)
    everyone = [c for group in by_budget.values() for c in group]
    total = len(everyone) * settings.choosing + len(by_budget) * len(FAMILIES) * len(blocks)
    with progress(total, "measuring", "pt") as bar:

        def measured(wanted: Iterable[tuple[SamplerSettings, int]]) -> list[Point]:
            points = []
            for candidate, block in wanted:
                points.append(bench.measure(candidate, block))
                bar.update()
            return points

        swept = measured((c, block) for block in range(settings.choosing) for c in everyone)
        best = list(_best(by_budget, swept))
        chosen = measured((c, block) for block in blocks for c in best)
    return Results(swept, chosen, [bench.floor(block) for block in blocks], record)


def plans(settings: Settings) -> dict[int, list[SamplerSettings]]:
    """The candidates of every budget.  Raises UserError for a budget that cannot be matched."""
    return {budget: candidates(settings.levels, budget) for budget in settings.budgets}


def outline(by_budget: dict[int, list[SamplerSettings]]) -> dict[str, list[str]]:
    """The candidates of each budget in words."""
    return {f"{budget} NFE": [c.label for c in group] for budget, group in by_budget.items()}


def _best(
    by_budget: dict[int, list[SamplerSettings]], swept: list[Point]
) -> Iterator[SamplerSettings]:
    """Of each budget and family the candidate with the lowest mean total error."""
    totals: dict[tuple[int, str], float] = defaultdict(float)
    for point in swept:
        totals[point.nfe, point.label] += point.total
    for budget, group in by_budget.items():
        for family in FAMILIES:
            own = [c for c in group if c.family == family]
            yield min(own, key=lambda c: totals[budget, c.label])
