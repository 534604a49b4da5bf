"""A comparison from resolved options to its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comparison.choose import choose_restart, selection_cost
from comparison.measure import Harness, measure
from comparison.report import markdown, ordered, write_report
from comparison.rows import (
    Row,
    ceiling_rows,
    classic_rows,
    distinct,
    learned_rows,
    load_students,
    pds_rows,
    restart_row,
)
from denoisers.cards import Card
from denoisers.registry import ModelSource
from metrics.detectors import Detector, load_reference
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import progress
from runtime.record import RunRecord

PDS_ITERATIONS = "50"  #: 20 times fewer than published without preconditioning


@dataclass(frozen=True)
class Job:
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


def prepare(options: dict[str, Any], world: World, detector: Detector) -> Job:
    """Load everything and lay out the rows.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    asked = options["budgets"]
    budgets = [] if asked == "none" else _numbers("--budgets", asked, 1)
    rounds = _numbers("--select", options["select"], 2)
    num, blocks = options["num"], options["blocks"]
    if num % blocks or num // blocks < 2:
        raise UserError(
            f"--num {num} does not fall into {blocks} equal blocks of two or more images; "
            f"give --num {max(2, round(num / blocks)) * blocks}"
        )
    model = ModelSource.from_options(options).load(options["dtype"], world)
    specs = [s for s in options["predictors"].split(",") if s]
    students = load_students(specs, model.card, "exps", world.device)
    extra = _extra(options, model.card)
    ceilings = ceiling_rows(model.card) if options["ceilings"] else []
    if not budgets and not extra and not ceilings:
        raise UserError("--budgets none leaves no row: give budgets, or --with pds")
    unused = [s.name for s in students if s.settings.nfe() not in budgets]
    if unused:
        raise UserError(
            f"predictor {unused[0]} spends none of the budgets {options['budgets']}; "
            "add its NFE to --budgets, or leave it out"
        )
    harness = Harness(
        model,
        detector,
        load_reference(options["ref"], detector),
        range(num),
        blocks,
        -(-options["batch"] // world.size),
        torch.float64 if options["dtype"] == "float64" else torch.float32,
        world,
    )
    rows = {
        b: classic_rows(b, model.card, options["schedule_type"])
        + learned_rows(b, students, model.card)
        for b in budgets
    }
    record = RunRecord.make(
        "compare",
        {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        {"name": model.card.name, "sha256": model.sha256},
        {
            **harness.describe(),
            "budgets": budgets,
            "predictors": [s.name for s in students],
            "world_size": world.size,
            "device": str(world.device),
        },
    )
    return Job(harness, rows, extra, ceilings, rounds, options["outdir"], record)


def run(job: Job, world: World) -> str:
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
    files = write_report(job.folder, job.record, results)
    return "\n".join([markdown(ordered(results)), *map(str, files)])


def _rows(job: Job, tick: Any, say: Any) -> list[Row]:
    """All rows in the order of work, Restart's plans chosen."""
    rows: list[Row] = []
    for budget, fixed in job.rows.items():
        say(f"choosing Restart at {budget} NFE")
        sampler = choose_restart(budget, job.harness, job.rounds, job.folder, tick)
        rows += [*fixed, restart_row(budget, sampler)]
    return distinct([*rows, *job.extra, *job.ceilings])


def _extra(options: dict[str, Any], card: Card) -> list[Row]:
    """The rows of ``--with``."""
    given = [k for k in ("iterations", "freq_mask_path", "space_mask_path") if options[k]]
    if "pds" not in options["extra"]:
        if given:
            raise UserError(f"--{given[0]} {options[given[0]]} means nothing without --with pds")
        return []
    iterations = _numbers("--iterations", options["iterations"] or PDS_ITERATIONS, 2)
    masks = options["freq_mask_path"], options["space_mask_path"]
    return pds_rows(iterations, card, *masks)


def _numbers(flag: str, text: str, least: int) -> list[int]:
    """Whole numbers by comma, each once, in order."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    bad = [p for p in parts if not p.isdigit() or int(p) < least]
    if bad or not parts:
        raise UserError(
            f"{flag} {text!r} is no list of whole numbers of {least} or more; give {flag} 5,7"
        )
    return sorted({int(p) for p in parts})
