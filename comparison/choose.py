"""Choosing Restart's plan for a small budget, on seeds that the table never sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparison.measure import Harness
from restart.budget import Candidate, candidates
from runtime.errors import UserError
from runtime.files import atomic_write
from samplers.sampler import Sampler

#: Seeds of the selection start here: far above any seed that a table reports on.
SELECTION_START = 10_000_000
KEEP = 0.25  #: of the candidates from one round to the next


def choose_restart(
    budget: int,
    harness: Harness,
    rounds: Sequence[int],
    folder: Path,
    tick: Callable[[int], object],
) -> Sampler:
    """The plan of exactly ``budget`` NFE with the lowest FID on selection seeds.

    Successive halving: ``rounds`` are the numbers of images per candidate, the best quarter of
    each round goes on to the next.  The trace goes to ``folder/selection-<budget>.json``; the
    same selection is not run twice.  Raises UserError where no plan spends the budget.
    """
    card = harness.model.card
    field = {c.label: c for c in candidates(budget, card.sigma_min, card.sigma_max)}
    if not field:
        raise UserError(f"no Restart plan spends exactly {budget} NFE: leave this budget out")
    file = folder / f"selection-{budget}.json"
    identity = _identity(harness, list(field), rounds)
    trace = _known(file, identity) or _select(field, harness, rounds, tick)
    if harness.world.is_main:
        with atomic_write(file) as temporary:
            temporary.write_text(
                json.dumps({"identity": identity, "rounds": trace}, indent=2) + "\n",
                encoding="utf-8",
            )
    best = trace[-1][0]["label"]
    return _sampler(field[best], len(field))


def selection_cost(budget: int, harness: Harness, rounds: Sequence[int]) -> int:
    """Images that the selection makes, for the progress bar."""
    card = harness.model.card
    left = len(list(candidates(budget, card.sigma_min, card.sigma_max)))
    total = 0
    for images in rounds:
        total += left * images
        left = _survivors(left)
    return total


def _select(
    field: dict[str, Candidate],
    harness: Harness,
    rounds: Sequence[int],
    tick: Callable[[int], object],
) -> list[list[dict[str, Any]]]:
    left = list(field)
    trace: list[list[dict[str, Any]]] = []
    for images in rounds:
        seeds = range(SELECTION_START, SELECTION_START + images)
        scored: list[dict[str, Any]] = []
        for label in left:
            fid, _, _ = harness.fid(_sampler(field[label], len(field)), seeds, 1, tick)
            scored.append({"label": label, "fid": fid.fid, "n": fid.n})
        scored.sort(key=lambda entry: entry["fid"])
        trace.append(scored)
        left = [entry["label"] for entry in scored[: _survivors(len(left))]]
    return trace


def _survivors(count: int) -> int:
    return max(1, round(count * KEEP))


def _sampler(candidate: Candidate, field_size: int) -> Sampler:
    settings = {"sampler": "restart", "choice": candidate.label, "candidates": field_size}
    return Sampler(candidate.label, candidate.plan, settings)


def _identity(harness: Harness, labels: list[str], rounds: Sequence[int]) -> dict[str, Any]:
    same = {k: v for k, v in harness.describe().items() if k not in ("seeds", "blocks")}
    return {**same, "candidates": labels, "images": list(rounds), "start": SELECTION_START}


def _known(file: Path, identity: dict[str, Any]) -> list[list[dict[str, Any]]] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    trace: list[list[dict[str, Any]]] = content["rounds"]
    return trace
