"""A comparison: from options to its rows, and from the rows to its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comparison.baselines import completed
from comparison.kept_rows import KeptRows
from comparison.measure import measure
from comparison.report.html import closing_line, write_page
from comparison.report.table import markdown
from comparison.report.write import write_report
from comparison.rows import (
    DEFAULT_SOLVERS,
    Row,
    ceiling_rows,
    classic_rows,
    diffusers_rows,
    distinct,
    pds_rows,
    restart_row,
    timed_rows,
)
from comparison.seed_provenance import seeds_section
from comparison.significance import with_gaps
from comparison.students import learned_restart_rows, learned_rows, load_students, table_rate
from denoisers.cards import Card
from evaluation.harness import Harness, HarnessOptions, open_harness
from ns.experiments import AnyStudent
from plan_search.objectives import choose_restart, selection_cost
from runtime.bounds import MOST_IMAGES, MOST_SEARCHED
from runtime.dist import World
from runtime.errors import UserError
from runtime.lists import parse_whole_numbers
from runtime.log import progress
from runtime.options import Json, flat_options
from runtime.outputs import claimed
from runtime.record import RECORD, RunRecord
from runtime.seeds import selection_seeds
from runtime.typed import to_plain
from samplers.options import SamplerOptions
from solvers.grids import MOST_NODES

#: What ``--with`` adds, and the options that require it.
EXTRA: dict[str, tuple[str, ...]] = {
    "diffusers": (),
    "pds": ("iterations", "freq_mask_path", "space_mask_path"),
    "learned-restart": ("restart_info",),
}
PDS_ITERATIONS = "50"  #: 20 times fewer than published without preconditioning


@dataclass(frozen=True)
class CompareOptions:
    """What ``compare.py`` is asked for, under the names of its flags."""

    harness: HarnessOptions
    predictors: tuple[str, ...] = ()
    budgets: str = "3,5,7,9"
    num: int = 2000  #: images per row
    blocks: int = 4
    select: str = "64,256"  #: images per candidate in each round of Restart's selection, or none
    ceilings: bool = True
    extra: tuple[str, ...] = ()  #: keys of `EXTRA`
    restart_info: str | None = None
    iterations: str | None = None
    freq_mask_path: str | None = None
    space_mask_path: str | None = None
    schedule_type: str | None = None
    solvers: str = DEFAULT_SOLVERS  #: of the classic rows
    times: tuple[float, ...] | None = None  #: of more classic rows
    no_cache: bool = False  #: measure every row, also those that are kept
    outdir: Path = Path("samples/compare")


@dataclass(frozen=True)
class ComparisonJob:
    """A comparison, laid out; nothing has been loaded or written yet."""

    command: str  #: of the record
    options: object  #: a dataclass, for the record
    harness: HarnessOptions  #: with the guidance rate of the table
    card: Card
    seeds: range
    blocks: int
    folder: Path
    rows: Mapping[int, Sequence[Row]]  #: by budget, all but Restart's row, which is chosen first
    extra: Sequence[Row]  #: at budgets of their own
    ceilings: Sequence[Row]
    rounds: Sequence[int]  #: images per candidate in Restart's selection; none without Restart
    selection_nfe: int  #: evaluations of all selections
    facts: Mapping[str, Json]  #: more for the record
    kept: KeptRows = KeptRows()

    def record(self, harness: Harness | None = None) -> RunRecord:
        """The record of this run; without a harness, in a dry run, what is known before it."""
        sha256 = self.harness.model.known_sha256
        plan = self.harness.describe(self.seeds, self.blocks)
        processes: dict[str, Json] = {}
        if harness is not None:
            sha256, plan = harness.model.sha256, to_plain(harness.identity)
            processes = {"world_size": harness.here.size, "device": str(harness.here.device)}
        model: dict[str, Json] = {"name": self.card.name, "sha256": sha256}
        plan = {**plan, **self.facts, **processes}
        return RunRecord.make(self.command, flat_options(self.options), model, plan)

    def outline(self) -> str:
        """The record and the rows, for a dry run."""
        lines = [self.record().to_json()]
        for budget, rows in self.rows.items():
            names = [row.method for row in rows] + ["Restart (chosen)"] * bool(self.rounds)
            lines.append(f"{budget} NFE: {', '.join(names)}")
        lines += map(str, self.extra)
        lines.append(f"ceilings: {', '.join(row.method for row in self.ceilings) or 'none'}")
        return "\n".join(lines)

    def run(self, here: World, harness: Harness | None = None) -> str:
        """Choose, measure and report; returns the table and where the report lies.

        ``harness`` takes the place of the one that the options name.
        """
        with claimed(self.folder, here, self.command):
            return self._run(here, harness)

    def _run(self, here: World, harness: Harness | None) -> str:
        if harness is None:
            harness = open_harness(self.harness, self.seeds, self.blocks, here)
        record = self.record(harness)
        if here.is_main:
            record.write(self.folder / RECORD)
        measured = []
        with progress(self._nfe(), "compare", " NFE", enabled=here.is_main, scale=True) as bar:
            for row in self._rows(harness, bar.update, bar.set_description):
                bar.set_description(f"{row.method} at {row.sampler.nfe} NFE")
                tick = _in_nfe(row.sampler.nfe, bar.update)
                measured.append(measure(row, harness, self.folder, tick, self.kept))
        here.barrier()
        if not here.is_main:
            return ""
        results = completed(record, with_gaps(measured, harness, self.folder))
        files = write_report(self.folder, results)
        last = closing_line(write_page(self.folder))
        return "\n".join([markdown(results.rows), *map(str, files), last])

    def _nfe(self) -> int:
        """Evaluations in all, of which the rest of the time is estimated."""
        each = [row.sampler.nfe for row in (*self.extra, *self.ceilings)]
        for budget, rows in self.rows.items():
            each += [budget] * (len(rows) + bool(self.rounds))
        return len(self.seeds) * sum(each) + self.selection_nfe

    def _rows(
        self, harness: Harness, tick: Callable[[int], object], say: Callable[[str], object]
    ) -> list[Row]:
        """All rows in the order of work, Restart's plans chosen."""
        rows: list[Row] = []
        for budget, fixed in self.rows.items():
            rows += fixed
            if self.rounds:
                say(f"choosing Restart at {budget} NFE")
                counted = _in_nfe(budget, tick)
                sampler = choose_restart(
                    budget, harness, self.rounds, self.folder, counted, self.kept.folders
                )
                rows.append(restart_row(budget, sampler))
        return distinct([*rows, *self.extra, *self.ceilings])


def _in_nfe(nfe: int, tick: Callable[[int], object]) -> Callable[[int], object]:
    """A callback that is told of images, and tells ``tick`` of their evaluations."""
    return lambda images: tick(images * nfe)


def prepare(options: CompareOptions) -> ComparisonJob:
    """Lay out the rows.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    asked = options.budgets
    budgets = [] if asked == "none" else parse_whole_numbers("--budgets", asked, 1, MOST_SEARCHED)
    rounds: Sequence[int] = ()
    if options.select != "none":
        rounds = parse_whole_numbers("--select", options.select, 2, MOST_IMAGES)
    selection = selection_seeds(rounds[-1] if budgets and rounds else 0)
    seeds = row_seeds(options.num, options.blocks)
    card = options.harness.model.card()
    students = load_students(options.predictors, card)
    rate = table_rate(options.harness.conditions.guidance_rate, students)
    harness = with_rate(options.harness, rate)
    check_conditions(harness, seeds, selection)
    extra = _extra_rows(options, students, card, rate)
    ceilings = ceiling_rows(card, rate) if options.ceilings else []
    if not budgets and not extra and not ceilings:
        raise UserError("--budgets none leaves no row: give budgets, or --with pds")
    rows = _rows_by_budget(options, budgets, students, card, rate)
    facts: dict[str, Json] = {
        "budgets": list(budgets),
        "predictors": [student.name for student in students],
        "guidance_rate": rate,
        "seeds": seeds_section(seeds, selection, students),
    }
    costs = {budget: selection_cost(budget, card, rate, rounds) for budget in budgets if rounds}
    selection_nfe = sum(budget * images for budget, images in costs.items())
    return ComparisonJob(
        "compare", options, harness, card, seeds, options.blocks, options.outdir,
        rows, extra, ceilings, rounds, selection_nfe, facts,
        KeptRows() if options.no_cache else KeptRows.of(options.harness.model.cache_dir),
    )  # fmt: skip


def _rows_by_budget(
    options: CompareOptions,
    budgets: Sequence[int],
    students: Sequence[AnyStudent],
    card: Card,
    guidance_rate: float | None,
) -> dict[int, list[Row]]:
    """Rows at the budgets; UserError for a student that spends none of them."""
    learned = learned_rows(students, card, guidance_rate)
    for student, row in zip(students, learned, strict=True):
        if row.budget not in budgets and "learned-restart" not in options.extra:
            raise UserError(
                f"predictor {student.name} spends {row.budget} NFE, which is not among --budgets "
                f"{options.budgets}: add it, or leave the predictor out"
            )
    library = "diffusers" in options.extra
    if library and not budgets:
        raise UserError("--with diffusers has rows only at --budgets: give some, or leave it out")
    timed = timed_rows(options.times, budgets, card, guidance_rate, options.solvers)
    return {
        budget: [
            *classic_rows(budget, card, guidance_rate, options.schedule_type, options.solvers),
            *timed[budget],
            *(diffusers_rows(budget, card, guidance_rate) if library else ()),
            *(row for row in learned if row.budget == budget),
        ]
        for budget in budgets
    }


def row_seeds(num: int, blocks: int) -> range:
    """The seeds of every row; UserError where they do not fall into equal blocks."""
    if num % blocks or num // blocks < 2:
        raise UserError(
            f"--num {num} cannot be split into {blocks} equal blocks of two or more images; "
            f"give --num {max(2, round(num / blocks)) * blocks}"
        )
    return range(num)


def with_rate(options: HarnessOptions, guidance_rate: float | None) -> HarnessOptions:
    """The options with the guidance rate that all rows have."""
    return replace(options, conditions=options.conditions.at(guidance_rate))


def check_conditions(
    options: HarnessOptions, seeds: Sequence[int], selection: Sequence[int] = ()
) -> None:
    """Raise UserError for conditions that the model does not take, or too few prompts."""
    prompts = len(options.resolve_conditions(()).prompts)
    for flag, images in (("--num", len(seeds)), ("--select", len(selection))):
        if 1 < prompts < images:
            raise UserError(
                f"{flag} {images} is more images than --prompt_path has prompts: give {flag} "
                f"{prompts} or less"
            )


def _extra_rows(
    options: CompareOptions,
    students: Sequence[AnyStudent],
    card: Card,
    guidance_rate: float | None,
) -> list[Row]:
    """The rows of ``--with``."""
    for kind, flags in EXTRA.items():
        for flag in flags:
            value = getattr(options, flag)
            if value and kind not in options.extra:
                raise UserError(f"--{flag} {value} requires --with {kind}")
    rows: list[Row] = []
    if "learned-restart" in options.extra:
        if not students:
            raise UserError("--with learned-restart needs --predictors")
        rows += learned_restart_rows(students, card, options.restart_info, guidance_rate)
    if "pds" in options.extra:
        asked = options.iterations or PDS_ITERATIONS
        masks = SamplerOptions(
            freq_mask_path=options.freq_mask_path,
            space_mask_path=options.space_mask_path,
            guidance_rate=guidance_rate,
        )
        rows += pds_rows(parse_whole_numbers("--iterations", asked, 2, MOST_NODES), card, masks)
    return rows
