"""Solver errors: from options to the rows and the exact solutions they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from comparison.report.html import closing_line, write_page
from comparison.rows import (
    DEFAULT_SOLVERS,
    Row,
    ceiling_rows,
    classic_rows,
    distinct,
    heun_ceiling_row,
    timed_rows,
)
from comparison.solver_error.exact import Exact, Problem
from comparison.solver_error.harness import ErrorHarness
from comparison.solver_error.measure import curve, measure_row, shown_trajectory, solve
from comparison.solver_error.report import by_error, markdown, write_errors
from comparison.solver_error.results import SkippedRow, SolverErrorResults, SolverErrorRow
from comparison.solver_error.walks import level, times, walks
from comparison.students import learned_rows, load_students, table_rate
from denoisers.cards import Card
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from evaluation.detectors import DetectorOptions, check_images, open_detector
from metrics.detectors import Detector
from ns.experiments import AnyStudent
from runtime.dist import World
from runtime.errors import UserError
from runtime.lists import parse_whole_numbers
from runtime.log import note_once, progress
from runtime.options import Json, flat_options
from runtime.outputs import claimed
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from solvers.grids import MOST_NODES

NO_DETECTOR = "none"
CHECK = 200  #: nodes of the Heun walk that checks the exact solutions
STOCHASTIC = "stochastic: no exact ODE path"
RECORD = "errors-run.json"
SHARED = ("compare", "nfe_sweep")  #: commands whose report may be in the same folder
SOLUTIONS = "exact"  #: folder of the exact solutions


@dataclass(frozen=True)
class SolverErrorOptions:
    """What ``solver_error.py`` is asked for, under the names of its flags."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    predictors: tuple[str, ...] = ()
    budgets: str = "3,5,7,9"
    seeds: str = "0-31"
    tol: float = 1e-4  #: relative and absolute, of dopri5
    check: bool = False
    ceilings: bool = True
    schedule_type: str | None = None
    solvers: str = DEFAULT_SOLVERS  #: of the classic rows
    times: tuple[float, ...] | None = None  #: of more classic rows
    batch: int = 8  #: images that are solved together
    outdir: Path = Path("samples/errors")


@dataclass(frozen=True)
class SharedSolutions:
    """Rows that start at one noise level, and all times at which they need exact states."""

    start: float
    times: tuple[float, ...]  #: decreasing
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SolverErrorJob:
    """A measurement, laid out; nothing has been loaded or written yet."""

    options: SolverErrorOptions
    card: Card
    conditions: Conditions  #: with the guidance rate of the table
    seeds: Sequence[int]
    budgets: Sequence[int]
    students: Sequence[AnyStudent]
    solutions: Sequence[SharedSolutions]  #: nearly always one
    skipped: Sequence[SkippedRow]

    @property
    def rows(self) -> list[Row]:
        return [row for shared in self.solutions for row in shared.rows]

    def record(self, weights_sha256: str | None, here: World | None = None) -> RunRecord:
        """The record of this run; ``here`` is None for a dry run."""
        nfe: dict[str, Json] = {row.key: row.sampler.nfe for row in self.rows}
        plan: dict[str, Json] = {
            "budgets": list(self.budgets),
            "predictors": [student.name for student in self.students],
            "guidance_rate": self.conditions.guidance_rate,
            "nfe": nfe,
            "device": None if here is None else str(here.device),
        }
        model: dict[str, Json] = {"name": self.card.name, "sha256": weights_sha256}
        return RunRecord.make("solver_error", flat_options(self.options), model, plan)

    def outline(self) -> str:
        """The record and the rows, for a dry run."""
        record = self.record(self.options.model.known_sha256)
        skipped = (f"left out: {row.method}: {row.why}" for row in self.skipped)
        return "\n".join([record.to_json(), *map(str, self.rows), *skipped])

    def run(self, here: World, detector: Detector | None = None) -> str:
        """Solve, measure and report; returns the table and where the report lies.

        ``detector`` takes the place of the one that the options name.
        """
        with claimed(self.options.outdir, here, *SHARED):
            return self._run(here, detector)

    def _run(self, here: World, detector: Detector | None) -> str:
        options = self.options
        model = options.model.load(here)
        if detector is None and options.detector.detector != NO_DETECTOR:
            detector = open_detector(options.detector, here)
        for student in self.students:
            student.to(here.device)
            note_once(student.note_on(model.sha256))
        harness = ErrorHarness(detector, self.seeds, options.batch, here)
        check_images([] if detector is None else [detector], model, options.model.state_dtype, here)
        record = self.record(model.sha256, here)
        if here.is_main:
            record.write(options.outdir / RECORD)
        results = self._measure(model, harness, record)
        here.barrier()
        if not here.is_main:
            return ""
        files = write_errors(options.outdir, results)
        last = closing_line(write_page(options.outdir))
        return "\n".join([markdown(results), *map(str, files), last])

    def _measure(
        self, model: Model, harness: ErrorHarness, record: RunRecord
    ) -> SolverErrorResults:
        exacts = [self._exact(shared, model, harness.here) for shared in self.solutions]
        total = len(self.seeds) * (len(exacts) + len(self.rows))
        rows: list[SolverErrorRow] = []
        folder = self.options.outdir
        with progress(total, "exact solutions", "img", enabled=harness.here.is_main) as bar:
            solved = [solve(harness, exact, self.options.seeds, bar.update) for exact in exacts]
            for shared, exact in zip(self.solutions, exacts, strict=True):
                for row in shared.rows:
                    bar.set_description(f"{row.method} at {row.sampler.nfe} NFE")
                    rows.append(measure_row(row, exact, harness, folder, bar.update))
        drawn = [row for row in self.solutions[0].rows if row.budget is not None]
        return SolverErrorResults(
            record=record,
            exact=solved[0].exact,
            plane=solved[0].plane,
            rows=tuple(by_error(rows)),
            skipped=tuple(self.skipped),
            trajectory=shown_trajectory(harness, exacts[0], drawn),
        )

    def _exact(self, shared: SharedSolutions, model: Model, here: World) -> Exact:
        options = self.options
        problem = Problem(
            model, self.conditions, shared.start, options.model.state_dtype, here.device
        )
        return Exact(problem, options.tol, shared.times, options.outdir / SOLUTIONS)


def prepare(options: SolverErrorOptions) -> SolverErrorJob:
    """Lay out the rows and the exact solutions that they need.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = parse_seeds(options.seeds)
    budgets = parse_whole_numbers("--budgets", options.budgets, 1, MOST_NODES)
    card = options.model.card()
    students = load_students(options.predictors, card)
    rate = table_rate(options.conditions.guidance_rate, students)
    conditions = options.conditions.at(rate).resolve(card)
    conditions.check(card, seeds)
    learned = learned_rows(students, card, rate)
    rows: list[Row] = []
    timed = timed_rows(options.times, budgets, card, rate, options.solvers)
    for budget in sorted({*budgets, *(row.sampler.nfe for row in learned)}):
        if budget in budgets:
            rows += classic_rows(budget, card, rate, options.schedule_type, options.solvers)
            rows += timed[budget]
        rows += [row for row in learned if row.budget == budget]
    rows += ceiling_rows(card, rate) if options.ceilings else []
    if options.check:
        rows.append(heun_ceiling_row(CHECK, card, rate))
    solutions, skipped = lay_out(distinct(rows))
    if not solutions:
        raise UserError("no row is left that solves the ODE: add --budgets or --predictors")
    return SolverErrorJob(options, card, conditions, seeds, budgets, students, solutions, skipped)


def lay_out(rows: Iterable[Row]) -> tuple[list[SharedSolutions], list[SkippedRow]]:
    """The rows by the exact solutions that they share, and those that have none."""
    by_start: dict[float, list[Row]] = {}
    skipped = []
    for row in rows:
        if not walks(row.sampler):
            skipped.append(SkippedRow(row.method, STOCHASTIC))
        else:
            by_start.setdefault(level(row.sampler.start), []).append(row)
    solutions = []
    for start, sharing in by_start.items():
        levels = {t for row in sharing for t in times(walks(row.sampler))}
        levels |= set(curve(levels))
        visited = tuple(sorted(levels, reverse=True))
        solutions.append(SharedSolutions(start, visited, tuple(sharing)))
    return solutions, skipped
