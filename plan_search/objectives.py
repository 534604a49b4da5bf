"""Choosing Restart's plan for a budget, on seeds that no table reports on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from denoisers.batch import SeededBatch
from denoisers.cards import Card
from evaluation.harness import Harness
from plan_search.halving import search, search_images
from plans.exact import Visited, exact_end
from restart.candidates import INTERVALS, WALKS, Candidate, RestartWalks, candidates
from restart.intervals import interval_json
from runtime.errors import UserError
from runtime.options import Json
from runtime.seeds import SELECTION_START, selection_seeds
from runtime.typed import to_plain
from samplers.build import build
from samplers.options import SamplerOptions
from samplers.sampler import Sampler

TOLERANCE = 1e-4  #: of dopri5: within 1 % of the error of 9-NFE plans on the bundled model


MOST_PLANS = 20_000  #: a minute of listing them; budgets of 20 have 3400 with two intervals


@dataclass(frozen=True)
class Space:
    """The plans that compete for a budget."""

    intervals: Sequence[tuple[float, float]] = INTERVALS
    walks: Sequence[RestartWalks] = WALKS
    most: int = 1  #: intervals in a plan

    def field(self, budget: int, card: Card, guidance_rate: float | None = None) -> list[Candidate]:
        """All plans of exactly ``budget`` NFE, at the cost of a call at ``guidance_rate``.

        Raises UserError where there is none, and where there are more than `MOST_PLANS`.
        """
        plans = candidates(
            budget,
            card.sigma_min,
            card.sigma_max,
            cost=card.cost(guidance_rate),
            intervals=self.intervals,
            walks=self.walks,
            most=self.most,
        )
        listed = list(islice(plans, MOST_PLANS + 1))
        if len(listed) > MOST_PLANS:
            raise UserError(
                f"more than {MOST_PLANS} Restart plans spend exactly {budget} NFE: give fewer "
                "--intervals or --walks, a smaller --most, or a smaller budget"
            )
        if not listed:
            raise UserError(
                f"no Restart plan spends exactly {budget} NFE: leave this budget out, or give "
                "compare.py --select none"
            )
        return listed


def restart_options(candidate: Candidate, guidance_rate: float | None = None) -> SamplerOptions:
    """The options of the sampler whose plan is the candidate's."""
    walks = candidate.walks
    return SamplerOptions(
        sampler="restart",
        main_solver=walks.main.name,
        restart_solver=walks.descent.name,
        num_steps=candidate.num_steps,
        afs=walks.main.afs,
        final_zero=walks.final_zero,
        restart_info=interval_json(candidate.intervals),
        guidance_rate=guidance_rate,
    )


def restart_sampler(
    candidate: Candidate, card: Card, guidance_rate: float | None = None
) -> Sampler:
    """The sampler whose plan is the candidate's, under the candidate's label."""
    return replace(build(restart_options(candidate, guidance_rate), card), label=candidate.label)


class Objective(Protocol):
    """A score of samplers on seeds: lower is better."""

    def describe(self) -> dict[str, Json]:
        """What two scores must share to be compared, apart from the seeds."""
        ...

    def __call__(
        self, sampler: Sampler, seeds: Sequence[int], tick: Callable[[int], object]
    ) -> float: ...


@dataclass(frozen=True)
class Fid:
    """FID to the harness's reference."""

    harness: Harness

    def describe(self) -> dict[str, Json]:
        identity = to_plain(self.harness.identity)
        kept = {key: identity[key] for key in identity if key not in ("seeds", "blocks")}
        return kept | _guidance(self.harness)

    def __call__(
        self, sampler: Sampler, seeds: Sequence[int], tick: Callable[[int], object]
    ) -> float:
        return self.harness.fid(sampler, seeds, 1, tick).fid.fid


@dataclass(frozen=True)
class Dopri5Error:
    """Root mean square distance, per value of the state, to the same plan solved exactly."""

    harness: Harness
    #: States on the way of exact plans, per batch of seeds: memory for time.
    visited: dict[tuple[int, ...], Visited] = field(default_factory=dict)

    def describe(self) -> dict[str, Json]:
        identity = to_plain(self.harness.identity)
        names = ("model", "model_sha256", "prompts", "label")
        kept = {name: identity[name] for name in names if name in identity}
        return {**kept, "tol": TOLERANCE, **_guidance(self.harness)}

    def __call__(
        self, sampler: Sampler, seeds: Sequence[int], tick: Callable[[int], object]
    ) -> float:
        here, total = self.harness.here, torch.zeros(2, dtype=torch.float64)
        for batch in self.harness.generate(sampler, here.shard(seeds)):
            error = (batch.x - self.exact(sampler, batch.seeds)).cpu().double()
            total += torch.tensor([error.square().sum(), error.numel()], dtype=torch.float64)
            tick(len(batch.seeds) * here.size)
        squares, count = here.sum_(total).tolist()
        return math.sqrt(squares / count)

    @torch.inference_mode()
    def exact(self, sampler: Sampler, seeds: tuple[int, ...]) -> Tensor:
        """Where the sampler's plan ends from the latents of ``seeds`` if dopri5 solves its walks.

        (B, *shape); the latents and the noise of the jumps are those of the model's own process.
        """
        harness = self.harness
        conditions = replace(harness.conditions, guidance_rate=sampler.guidance_rate)
        drawn = SeededBatch.open(
            harness.model, conditions, seeds, harness.dtype, harness.here.device
        )
        x, visited = drawn.start(sampler.start), self.visited.setdefault(seeds, {})
        return exact_end(sampler.plan, drawn.meter, x, drawn.process, visited, TOLERANCE)


def _guidance(harness: Harness) -> dict[str, Json]:
    """The guidance rate, where there is one: it is in no other part of an identity."""
    rate = harness.conditions.guidance_rate
    return {} if rate is None else {"guidance_rate": rate}


def choose(
    field: Sequence[Candidate],
    objective: Objective,
    harness: Harness,
    rounds: Sequence[int],
    file: Path,
    tick: Callable[[int], object],
    kept: Sequence[Path] = (),
) -> tuple[Candidate, float]:
    """The candidate with the lowest objective on selection seeds, and that; a trace in ``file``.

    Successive halving over ``rounds`` images per candidate (`plan_search.halving`).  A selection
    that is finished, here or in a folder of ``kept`` ones, is not run again, and an interrupted
    one continues.
    """
    card, rate = harness.model.card, harness.conditions.guidance_rate

    def score(candidate: Candidate, images: int) -> float:
        sampler = restart_sampler(candidate, card, rate)
        return objective(sampler, selection_seeds(images), tick)

    identity: dict[str, Json] = {
        **objective.describe(),
        "candidates": [candidate.label for candidate in field],
        "images": list(rounds),
        "start": SELECTION_START,
    }
    trace = search(field, rounds, score, file, identity, harness.here, tick, kept)
    winner = trace[-1][0]
    return next(c for c in field if c.label == winner.label), winner.score


def choose_restart(
    budget: int,
    harness: Harness,
    rounds: Sequence[int],
    folder: Path,
    tick: Callable[[int], object],
    kept: Sequence[Path] = (),
) -> Sampler:
    """The plan of exactly ``budget`` NFE with the lowest FID to the data, for a row of a table."""
    card, rate = harness.model.card, harness.conditions.guidance_rate
    field = Space().field(budget, card, rate)
    file = folder / f"selection-{budget}.json"
    to_data = Fid(replace(harness, converged=None, others=()))
    best, _ = choose(field, to_data, harness, rounds, file, tick, kept)
    return replace(restart_sampler(best, card, rate), extra={"candidates": len(field)})


def selection_cost(
    budget: int, card: Card, guidance_rate: float | None, rounds: Sequence[int]
) -> int:
    """Images that the selection makes; UserError where no plan spends the budget."""
    return search_images(len(Space().field(budget, card, guidance_rate)), rounds)
