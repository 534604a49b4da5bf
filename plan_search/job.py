"""The search for a Restart plan on one's own model, from resolved options to its trace."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.job import make_record, numbers, open_harness
from evaluation.harness import Harness
from metrics.detectors import Detector
from plan_search.halving import search_images
from plan_search.objectives import Dopri5Error, Fid, Objective, Space, choose
from restart.candidates import Candidate, parse_intervals, parse_walks
from runtime.dist import World
from runtime.log import progress
from runtime.record import RunRecord
from runtime.seeds import selection_seeds

OBJECTIVES: dict[str, Callable[[Harness], Objective]] = {"fid": Fid, "dopri5": Dopri5Error}
#: Images per candidate in each round: FID needs many, the distance to the exact plan few.
ROUNDS = {"fid": "64,256,1024", "dopri5": "4,16"}


@dataclass(frozen=True)
class PlanSearchJob:
    """A search that is ready to start; nothing has been written yet."""

    harness: Harness
    fields: dict[int, list[Candidate]]  #: per budget
    kind: str  #: of objective
    rounds: list[int]
    folder: Path
    record: RunRecord

    def outline(self) -> str:
        """What would be run, in words: for a dry run."""
        lines = [self.record.to_json()]
        for budget, field in self.fields.items():
            images = search_images(len(field), self.rounds)
            lines.append(f"{budget} NFE: {len(field)} plans, {images} images of {budget} NFE")
        return "\n".join(lines)


def prepare(options: dict[str, Any], world: World, detector: Detector) -> PlanSearchJob:
    """Load everything and list the candidates.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    budgets, kind = numbers("--nfe", options["nfe"], 1), options["objective"]
    rounds = numbers("--select", options["select"] or ROUNDS[kind], 2)
    space = Space(
        parse_intervals(options["intervals"]), parse_walks(options["walks"]), options["most"]
    )
    harness = open_harness(options, world, detector, selection_seeds(rounds[-1]))
    fields = {budget: space.field(budget, harness.model.card) for budget in budgets}
    counts = {str(budget): len(field) for budget, field in fields.items()}
    more = {"budgets": budgets, "rounds": rounds, "candidates": counts}
    record = make_record("plan_search", options, harness, more)
    return PlanSearchJob(harness, fields, kind, rounds, options["outdir"], record)


def run(job: PlanSearchJob, world: World) -> str:
    """Search every budget; returns the best plans, how to sample by them, and where traces lie."""
    if world.is_main:
        job.record.write(job.folder / "run.json")
    objective = OBJECTIVES[job.kind](job.harness)
    total = sum(search_images(len(field), job.rounds) for field in job.fields.values())
    said = []
    with progress(total, "search", "img", enabled=world.is_main) as bar:
        for budget, field in job.fields.items():
            bar.set_description(f"{len(field)} plans of {budget} NFE")
            file = job.folder / f"search-{budget}-{job.kind}.json"
            best, score = choose(field, objective, job.harness, job.rounds, file, bar.update)
            said.append(
                f"{budget} NFE: {best.label}  ({job.kind} {score:.4g} on {job.rounds[-1]} "
                f"selection seeds; trace: {file})\n  {command(best, job)}"
            )
    world.barrier()
    return "\n".join(said)


def command(best: Candidate, job: PlanSearchJob) -> str:
    """How to sample by a plan."""
    options = {"dataset_name": job.harness.model.card.name, "sampler": "restart", **best.options}
    options["restart_info"] = json.dumps(options["restart_info"])
    model = {"model_path": job.record.options["model_path"]}
    given = {key: value for key, value in {**options, **model}.items() if value is not None}
    return shlex.join(
        ["python", "sample.py", *(f"--{key}={value}" for key, value in given.items())]
    )
