"""A comparison from resolved options to its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comparison.report.html import closing_line, write_page
from comparison.report.table import markdown, ordered, write_report
from comparison.rows import (
    Row,
    TrainedStudent,
    ceiling_rows,
    classic_rows,
    distinct,
    learned_restart_rows,
    learned_rows,
    load_students,
    pds_rows,
    restart_row,
)
from comparison.seed_provenance import seeds_section
from comparison.significance import with_gaps
from denoisers.cards import Card
from denoisers.registry import ModelSource
from evaluation.converged import NONE, open_converged
from evaluation.harness import Harness, measure
from metrics.detectors import Detector, load_reference
from plan_search.objectives import choose_restart, selection_cost
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import progress
from runtime.record import RunRecord
from runtime.seeds import selection_seeds

#: What ``--with`` adds, and the options that mean nothing without it.
EXTRA: dict[str, tuple[str, ...]] = {
    "pds": ("iterations", "freq_mask_path", "space_mask_path"),
    "learned-restart": ("restart_info",),
}
PDS_ITERATIONS = "50"  #: 20 times fewer than published without preconditioning


@dataclass(frozen=True)
class ComparisonJob:
    """A comparison that is ready to start; nothing has been written yet."""

    harness: Harness
    rows: dict[int, list[Row]]  #: per budget, all rows but Restart's, which is chosen first
    extra: list[Row]  #: what was asked for beside, at its own budgets
    ceilings: list[Row]
    rounds: list[int]  #: images per candidate in Restart's selection
    folder: Path
    record: RunRecord

    @property
    def budgets(self) -> list[int]:
        return list(self.rows)

    def outline(self) -> str:
        """What would be run, in words: for a dry run."""
        lines = [self.record.to_json()]
        for budget, rows in self.rows.items():
            lines.append(f"{budget} NFE: {', '.join(r.method for r in rows)}, Restart (chosen)")
        lines += [f"{row.budget} NFE: {row.method}, {row.detail}" for row in self.extra]
        lines.append(f"ceilings: {', '.join(r.method for r in self.ceilings) or 'none'}")
        return "\n".join(lines)


def prepare(options: dict[str, Any], world: World, detector: Detector) -> ComparisonJob:
    """Load everything and lay out the rows.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    asked = options["budgets"]
    budgets = [] if asked == "none" else numbers("--budgets", asked, 1)
    rounds = numbers("--select", options["select"], 2)
    selected = selection_seeds(rounds[-1] if budgets else 0)
    harness = open_harness(options, world, detector, check_blocks(options))
    card = harness.model.card
    specs = [s for s in options["predictors"].split(",") if s]
    students = load_students(specs, card, "exps", world.device)
    extra = _extra(options, students, card)
    ceilings = ceiling_rows(card) if options["ceilings"] else []
    if not budgets and not extra and not ceilings:
        raise UserError("--budgets none leaves no row: give budgets, or --with pds")
    unused = [s.name for s in students if s.settings.nfe() not in budgets]
    if unused and "learned-restart" not in options["extra"]:
        raise UserError(
            f"predictor {unused[0]} spends none of the budgets {options['budgets']}; "
            "add its NFE to --budgets, or leave it out"
        )
    rows = {
        b: classic_rows(b, card, options["schedule_type"]) + learned_rows(b, students, card)
        for b in budgets
    }
    seeds = seeds_section(harness.seeds, selected, students)
    more = {"budgets": budgets, "predictors": [s.name for s in students], "seeds": seeds}
    record = make_record("compare", options, harness, more)
    return ComparisonJob(harness, rows, extra, ceilings, rounds, options["outdir"], record)


def check_blocks(options: dict[str, Any]) -> range:
    """The seeds of every row; UserError where they do not fall into the blocks."""
    num, blocks = options["num"], options["blocks"]
    if num % blocks or num // blocks < 2:
        raise UserError(
            f"--num {num} does not fall into {blocks} equal blocks of two or more images; "
            f"give --num {max(2, round(num / blocks)) * blocks}"
        )
    return range(num)


def open_harness(
    options: dict[str, Any], world: World, detector: Detector, seeds: range
) -> Harness:
    """The model of the options, the detector and its references, for ``seeds``."""
    model = ModelSource.from_options(options).load(options["dtype"], world)
    return Harness(
        model,
        detector,
        load_reference(options["ref"], detector),
        seeds,
        options.get("blocks", 1),
        -(-options["batch"] // world.size),
        torch.float64 if options["dtype"] == "float64" else torch.float32,
        world,
        open_converged(options.get("ref_model", NONE), model, detector, seeds),
    )


def make_record(
    command: str, options: dict[str, Any], harness: Harness, more: dict[str, Any]
) -> RunRecord:
    """The record of a comparison on ``harness``."""
    model, here = harness.model, harness.world
    return RunRecord.make(
        command,
        {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        {"name": model.card.name, "sha256": model.sha256},
        {**harness.describe(), **more, "world_size": here.size, "device": str(here.device)},
    )


def run(job: ComparisonJob, world: World) -> str:
    """Choose, measure and report; returns the table and where the report lies."""
    num = len(job.harness.seeds)
    others = len(job.extra) + len(job.ceilings)
    listed = sum(len(rows) + 1 for rows in job.rows.values()) + others
    spent = sum(selection_cost(b, job.harness, job.rounds) for b in job.budgets)
    if world.is_main:
        job.record.write(job.folder / "run.json")
    results = []
    with progress(listed * num + spent, "compare", "img", enabled=world.is_main) as bar:
        for row in _rows(job, bar.update, bar.set_description):
            bar.set_description(f"{row.method} at {row.sampler.nfe} NFE")
            results.append(measure(row, job.harness, job.folder, bar.update))
    world.barrier()
    if not world.is_main:
        return ""
    results = with_gaps(results, job.harness, job.folder)
    files = write_report(job.folder, job.record, results)
    last = closing_line(write_page(job.folder))
    return "\n".join([markdown(ordered(results)), *map(str, files), last])


def _rows(job: ComparisonJob, tick: Any, say: Any) -> list[Row]:
    """All rows in the order of work, Restart's plans chosen."""
    rows: list[Row] = []
    for budget, fixed in job.rows.items():
        say(f"choosing Restart at {budget} NFE")
        sampler = choose_restart(budget, job.harness, job.rounds, job.folder, tick)
        rows += [*fixed, restart_row(budget, sampler)]
    return distinct([*rows, *job.extra, *job.ceilings])


def _extra(options: dict[str, Any], students: list[TrainedStudent], card: Card) -> list[Row]:
    """The rows of ``--with``."""
    asked = options["extra"]
    for kind, flags in EXTRA.items():
        given = [flag for flag in flags if options[flag]]
        if given and kind not in asked:
            raise UserError(f"--{given[0]} {options[given[0]]} means nothing without --with {kind}")
    rows: list[Row] = []
    if "learned-restart" in asked:
        if not students:
            raise UserError("--with learned-restart has nobody to walk it: give --predictors")
        rows += learned_restart_rows(students, card, options["restart_info"])
    if "pds" in asked:
        iterations = numbers("--iterations", options["iterations"] or PDS_ITERATIONS, 2)
        masks = options["freq_mask_path"], options["space_mask_path"]
        rows += pds_rows(iterations, card, *masks)
    return rows


def numbers(flag: str, text: str, least: int) -> list[int]:
    """Whole numbers by comma, each once, in order."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    bad = [p for p in parts if not p.isdigit() or int(p) < least]
    if bad or not parts:
        raise UserError(
            f"{flag} {text!r} is no list of whole numbers of {least} or more; give {flag} 5,7"
        )
    return sorted({int(p) for p in parts})
