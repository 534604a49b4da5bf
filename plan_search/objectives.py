"""Choosing Restart's plan for a budget, on seeds that no table ever sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.conditions import Conditions
from denoisers.prior import start
from evaluation.harness import Harness
from plan_search.halving import search, search_images
from plans.exact import Visited, exact_end
from plans.plan import with_kernel
from restart.candidates import INTERVALS, WALKS, Candidate, Walk, candidates
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.seeds import SELECTION_START, selection_seeds
from samplers.generate import generate
from samplers.sampler import Sampler
from solvers.driver import Meter

TOLERANCE = 1e-4  #: of dopri5: exact to 1 % of what plans of 9 NFE err by on the bundled model


@dataclass(frozen=True)
class Space:
    """The plans that compete for a budget."""

    intervals: Sequence[tuple[float, float]] = INTERVALS
    walks: Sequence[tuple[Walk, str]] = WALKS
    most: int = 1  #: intervals in a plan

    def field(self, budget: int, card: Card) -> list[Candidate]:
        """All of exactly ``budget`` NFE; UserError where there is none."""
        found = candidates(
            budget,
            card.sigma_min,
            card.sigma_max,
            intervals=self.intervals,
            walks=self.walks,
            most=self.most,
        )
        listed = list(found)
        if not listed:
            raise UserError(f"no Restart plan spends exactly {budget} NFE: leave this budget out")
        return listed


class Objective(Protocol):
    """A score of samplers on seeds: the lower, the better."""

    def describe(self) -> dict[str, Any]:
        """What two scores must share to be compared, the seeds aside."""
        ...

    def __call__(
        self, sampler: Sampler, seeds: Sequence[int], tick: Callable[[int], object]
    ) -> float: ...


@dataclass(frozen=True)
class Fid:
    """FID to the harness's reference."""

    harness: Harness

    def describe(self) -> dict[str, Any]:
        same = self.harness.describe()
        return {key: same[key] for key in same if key not in ("seeds", "blocks")}

    def __call__(
        self, sampler: Sampler, seeds: Sequence[int], tick: Callable[[int], object]
    ) -> float:
        return self.harness.fid(sampler, seeds, 1, tick).fid.fid


@dataclass(frozen=True)
class Dopri5Error:
    """Root mean square distance, per value of the state, to the same plan solved exactly."""

    harness: Harness
    #: What exact plans have visited, per batch of seeds: memory for time.
    visited: dict[tuple[int, ...], Visited] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        same = self.harness.describe()
        return {"model": same["model"], "model_sha256": same["model_sha256"], "tol": TOLERANCE}

    def __call__(
        self, sampler: Sampler, seeds: Sequence[int], tick: Callable[[int], object]
    ) -> float:
        h = self.harness
        total = torch.zeros(2, dtype=torch.float64)
        for made in generate(
            sampler,
            h.model,
            h.world.shard(seeds),
            batch=h.batch,
            device=h.world.device,
            dtype=h.dtype,
        ):
            error = (made.x - self._exact(sampler, made.seeds)).cpu().double()
            total += torch.tensor([error.square().sum(), error.numel()], dtype=torch.float64)
            tick(len(made.seeds) * h.world.size)
        squares, count = h.world.sum_(total).tolist()
        return math.sqrt(squares / count)

    @torch.inference_mode()
    def _exact(self, sampler: Sampler, seeds: tuple[int, ...]) -> Tensor:
        h, card, noise = self.harness, self.harness.model.card, SeedNoise(seeds)
        device = h.world.device
        meter = Meter(Conditions().bind(h.model, noise, device))

        def normal(name: tuple) -> Tensor:
            return noise.normal(name, card.shape, h.dtype, device)

        x = start(card, noise, sampler.start, h.dtype, device)
        plan = with_kernel(sampler.plan, card.pfgmpp)
        visited = self.visited.setdefault(seeds, {})
        return exact_end(plan, meter, x, normal, visited, TOLERANCE)


def choose(
    field: Sequence[Candidate],
    objective: Objective,
    harness: Harness,
    rounds: Sequence[int],
    file: Path,
    tick: Callable[[int], object],
) -> tuple[Candidate, float]:
    """The candidate with the lowest objective on selection seeds, and that; a trace in ``file``.

    Successive halving over ``rounds`` images per candidate (`plan_search.halving`); the same
    selection is not run twice, and a killed one goes on.
    """

    def score(candidate: Candidate, images: int) -> float:
        sampler = Sampler(candidate.label, candidate.plan)
        return objective(sampler, selection_seeds(images), tick)

    identity = {
        **objective.describe(),
        "candidates": [candidate.label for candidate in field],
        "images": list(rounds),
        "start": SELECTION_START,
    }
    trace = search(field, rounds, score, file, identity, harness.world, tick)
    winner = trace[-1][0]
    return next(c for c in field if c.label == winner.label), winner.score


def choose_restart(
    budget: int,
    harness: Harness,
    rounds: Sequence[int],
    folder: Path,
    tick: Callable[[int], object],
) -> Sampler:
    """The plan of exactly ``budget`` NFE with the lowest FID, for a row of the table."""
    field = Space().field(budget, harness.model.card)
    file = folder / f"selection-{budget}.json"
    to_data = Fid(replace(harness, converged=None))
    best, _ = choose(field, to_data, harness, rounds, file, tick)
    settings = {"sampler": "restart", **best.options, "candidates": len(field)}
    return Sampler(best.label, best.plan, settings)


def selection_cost(budget: int, harness: Harness, rounds: Sequence[int]) -> int:
    """Images that the selection makes, for the progress bar."""
    return search_images(len(Space().field(budget, harness.model.card)), rounds)
