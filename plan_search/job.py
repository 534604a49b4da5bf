"""The search for a Restart plan on a model, from its options to its trace."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from denoisers.cards import Card
from denoisers.conditions import Conditions
from evaluation.converged import NONE
from evaluation.harness import Harness, HarnessOptions, open_harness
from plan_search.halving import search_images
from plan_search.objectives import (
    Dopri5Error,
    Fid,
    Objective,
    Space,
    choose,
    restart_options,
)
from restart.candidates import INTERVALS, Candidate, parse_intervals, parse_walks
from runtime.bounds import MOST_IMAGES, MOST_SEARCHED
from runtime.dist import World
from runtime.lists import parse_whole_numbers
from runtime.log import progress
from runtime.options import Json, flat_options
from runtime.outputs import claimed
from runtime.record import RECORD, RunRecord
from runtime.seeds import selection_seeds
from runtime.typed import to_plain

OBJECTIVES: dict[str, Callable[[Harness], Objective]] = {"fid": Fid, "dopri5": Dopri5Error}
#: Images per candidate in each round: FID needs many, the distance to the exact plan few.
COMMAND = "plan_search"  #: of the record
ROUNDS = {"fid": "64,256,1024", "dopri5": "4,16"}


@dataclass(frozen=True)
class PlanSearchOptions:
    """What ``python -m tools.plan_search`` is asked for, under the names of its flags."""

    nfe: str  #: budgets
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    objective: str = "fid"
    select: str | None = None  #: images per plan in each round; None is the objective's own
    intervals: str = ",".join(f"{low:g}:{high:g}" for low, high in INTERVALS)
    most: int = 1  #: intervals in a plan
    walks: str = "heun+0/heun,heun+afs/heun,ipndm+afs/heun,ipndm+afs/ipndm"
    outdir: Path = Path("samples/search")


@dataclass(frozen=True)
class PlanSearchJob:
    """A search that is ready to start; nothing has been loaded or written yet."""

    options: PlanSearchOptions
    card: Card
    conditions: Conditions
    fields: Mapping[int, list[Candidate]]  #: per budget
    rounds: list[int]

    @property
    def seeds(self) -> range:
        """The seeds of the last round, which begin with those of the others."""
        return selection_seeds(self.rounds[-1])

    def record(self, about: Mapping[str, Json], here: World | None = None) -> RunRecord:
        """The record of the search; ``about`` is what its scores depend on, as far as is known."""
        given = flat_options(self.options)
        given.pop("ref_model")  # a search has one reference
        given["class"], given["prompts"] = given.pop("label"), self.conditions.describe()
        plan = {
            **about,
            "budgets": list(self.fields),
            "rounds": self.rounds,
            "candidates": {str(budget): len(plans) for budget, plans in self.fields.items()},
            "world_size": None if here is None else here.size,
            "device": None if here is None else str(here.device),
        }
        model = {"name": self.card.name, "sha256": about["model_sha256"]}
        return RunRecord.make(COMMAND, given, model, plan)

    def outline(self) -> str:
        """The record, and how many plans and images each budget has: for a dry run."""
        lines = [self.record(self.options.harness.describe(self.seeds, 1)).to_json()]
        for budget, plans in self.fields.items():
            images = search_images(len(plans), self.rounds)
            lines.append(f"{budget} NFE: {len(plans)} plans, {images} images of {budget} NFE")
        return "\n".join(lines)

    def run(self, here: World) -> str:
        """Search every budget; returns the best plans, how to sample with them, and the traces."""
        with claimed(self.options.outdir, here, COMMAND):
            return self._run(here)

    def _run(self, here: World) -> str:
        options, rounds = self.options, self.rounds
        harness = open_harness(options.harness, self.seeds, 1, here)
        if here.is_main:
            self.record(to_plain(harness.identity), here).write(options.outdir / RECORD)
        objective = OBJECTIVES[options.objective](harness)
        total = sum(search_images(len(plans), rounds) for plans in self.fields.values())
        lines = []
        with progress(total, "search", "img", enabled=here.is_main) as bar:
            for budget, plans in self.fields.items():
                bar.set_description(f"{len(plans)} plans of {budget} NFE")
                file = options.outdir / f"search-{budget}-{options.objective}.json"
                best, score = choose(plans, objective, harness, rounds, file, bar.update)
                lines.append(
                    f"{budget} NFE: {best.label}  ({options.objective} {score:.4g} on {rounds[-1]} "
                    f"selection seeds; trace: {file})\n  {self.command(best)}"
                )
        here.barrier()
        return "\n".join(lines)

    def command(self, best: Candidate) -> str:
        """How to sample with a plan."""
        model, conditions = self.options.harness.model, self.options.harness.conditions
        flags = {
            "dataset_name": self.card.name,
            **_asked(best, self.conditions.guidance_rate),
            "model_path": model.model_path,
            "model_family": model.model_family,
            "model_settings": model.model_settings,
            "companion_path": model.companion_path,
            "class": conditions.label,
            "prompt": conditions.prompt,
            "prompt_path": conditions.prompt_path,
            "negative_prompt": conditions.negative_prompt,
        }
        given = (f"--{key}={value}" for key, value in flags.items() if value is not None)
        return shlex.join(["python", "sample.py", *given])


def prepare(options: PlanSearchOptions) -> PlanSearchJob:
    """List the candidates of every budget.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    budgets = parse_whole_numbers("--nfe", options.nfe, 1, MOST_SEARCHED)
    rounds = parse_whole_numbers(
        "--select", options.select or ROUNDS[options.objective], 2, MOST_IMAGES
    )
    intervals, walks = parse_intervals(options.intervals), parse_walks(options.walks)
    space = Space(intervals, walks, options.most)
    options = replace(options, harness=replace(options.harness, ref_model=NONE))
    options.harness.detector.single()
    conditions = options.harness.resolve_conditions(selection_seeds(rounds[-1]))
    card = options.harness.model.card()
    fields = {budget: space.field(budget, card, conditions.guidance_rate) for budget in budgets}
    return PlanSearchJob(options, card, conditions, fields, rounds)


def _asked(candidate: Candidate, guidance_rate: float | None) -> dict[str, object]:
    """The options of a plan under the names of their flags."""
    asked = restart_options(candidate, guidance_rate)
    return {"sampler": asked.sampler, **asked.given()}
