"""Search for the best of many plans: successive halving by any score, killed and continued freely.

What a score may be.  A stochastic plan has no right answer per latent: an *exact* Restart does not
end where the ODE would have taken the same latent, so the distance to that end says nothing.
Two things can be asked for instead: how far the distribution of the samples is from that of a
reference (FID; the reference may be samples of dopri5), or how far the plan is from itself, solved
exactly (`plans.exact`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from restart.candidates import Candidate
from runtime.dist import World
from runtime.files import read_earlier, write_json

KEEP = 0.25  #: of the candidates from one round to the next

#: Of a candidate on that many images: the lower, the better.  Called on every process.
Score = Callable[[Candidate, int], float]


class Trial(NamedTuple):
    """What a round said of a candidate."""

    label: str
    score: float
    n: int  #: images


def search(
    field: Sequence[Candidate],
    rounds: Sequence[int],
    score: Score,
    file: Path,
    identity: dict[str, Any],
    world: World,
    skipped: Callable[[int], object] = lambda images: None,
) -> list[list[Trial]]:
    """All trials of each round, the best first; the first of the last round has won.

    ``rounds`` are the numbers of images per candidate; the best quarter of a round goes on to the
    next.  The trace is written to ``file`` after every trial, with ``identity``: a search of the
    same identity goes on there, and tells ``skipped`` the images that it did not have to make.
    """
    known = world.broadcast_object(_read(file, identity) if world.is_main else None) or []
    left = {candidate.label: candidate for candidate in field}
    if len(left) < len(field):
        raise ValueError("two candidates have one label: the trace could not tell them apart")
    trace: list[list[Trial]] = []
    for number, images in enumerate(rounds):
        trials = known[number] if number < len(known) else []
        trace.append(trials)
        done = {trial.label for trial in trials}
        for label, candidate in left.items():
            if label in done:
                skipped(images)
                continue
            trials.append(Trial(label, score(candidate, images), images))
            if world.is_main:
                _write(file, identity, trace)
        trials.sort(key=lambda trial: (trial.score, trial.label))
        left = {t.label: left[t.label] for t in trials[: survivors(len(trials))]}
    if world.is_main:
        _write(file, identity, trace)
    return trace


def survivors(count: int) -> int:
    """How many of ``count`` candidates go on."""
    return max(1, round(count * KEEP))


def search_images(candidates: int, rounds: Sequence[int]) -> int:
    """Images that a search makes in all."""
    total = 0
    for images in rounds:
        total += candidates * images
        candidates = survivors(candidates)
    return total


def _write(file: Path, identity: dict[str, Any], trace: list[list[Trial]]) -> None:
    rounds = [[trial._asdict() for trial in trials] for trials in trace]
    write_json(file, {"identity": identity, "rounds": rounds})


def _read(file: Path, identity: dict[str, Any]) -> list[list[Trial]] | None:
    """The trials of an earlier search of the same identity, or None."""
    content = read_earlier(file)
    if content is None or content["identity"] != json.loads(json.dumps(identity)):
        return None
    try:
        return [[Trial(**trial) for trial in trials] for trials in content["rounds"]]
    except (TypeError, KeyError):
        return None
