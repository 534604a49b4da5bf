"""Search for the best of many plans: successive halving by any score, interrupted and continued.

What a score may be.  A stochastic plan has no right answer per latent: an *exact* Restart does not
end where the ODE would have taken the same latent, so the distance to that end says nothing.
Two things can be measured instead: how far the distribution of the samples is from that of a
reference (FID; the reference may be samples of dopri5), or how far the plan is from itself, solved
exactly (`plans.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restart.candidates import Candidate
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import note
from runtime.options import Json
from runtime.typed import digest, read_earlier, to_plain, write_result

KEEP = 0.25  #: fraction of the candidates that each round keeps for the next

#: Score of a candidate on that many images: lower is better.  Called on every process.
Score = Callable[[Candidate, int], float]


@dataclass(frozen=True)
class Trial:
    """The score of a candidate in one round."""

    label: str
    score: float
    n: int  #: images


@dataclass(frozen=True)
class SearchTrace:
    """The file of a search: what its scores depend on, and all trials of each round so far."""

    identity: dict[str, Any]
    rounds: list[list[Trial]]


def search(
    field: Sequence[Candidate],
    rounds: Sequence[int],
    score: Score,
    file: Path,
    identity: Mapping[str, Json],
    here: World,
    skipped: Callable[[int], object] = lambda images: None,
    kept: Sequence[Path] = (),
) -> list[list[Trial]]:
    """All trials of each round, the best first; the first of the last round is the winner.

    ``rounds`` are the numbers of images per candidate; each round keeps the best quarter.  The
    trace is written to ``file`` after every trial, with ``identity``: a search of the same identity
    continues from there, and tells ``skipped`` how many images it did not have to make.  So does
    one that was finished for another file, if ``kept``, folders with such traces, holds it; a
    finished one is added to the last of them.

    Raises ValueError for two equal labels.
    """
    files = [file, *(place(identity, folder) for folder in kept)] if here.is_main else []
    found = max((_read(path, identity) for path in files), key=_trials, default=[])
    known = here.broadcast_object(found)
    left = {candidate.label: candidate for candidate in field}
    if len(left) < len(field):
        raise ValueError("two candidates have one label: the trace could not tell them apart")
    trace = SearchTrace(dict(identity), [])
    for number, images in enumerate(rounds):
        trials = known[number] if number < len(known) else []
        trace.rounds.append(trials)
        finished = {trial.label for trial in trials}
        for label, candidate in left.items():
            if label in finished:
                skipped(images)
                continue
            trials.append(Trial(label, score(candidate, images), images))
            if here.is_main:
                write_result(file, trace)
        trials.sort(key=lambda trial: (trial.score, trial.label))
        left = {t.label: left[t.label] for t in trials[: survivors(len(trials))]}
    if here.is_main:
        write_result(file, trace)
        if kept and trace.rounds != known:
            _keep(trace, kept[-1])
    return trace.rounds


def place(identity: Mapping[str, Json], folder: Path) -> Path:
    """Where the trace of a finished search lies in a folder of kept ones."""
    return folder / f"selection-{digest(identity)}.json"


def _trials(rounds: Sequence[Sequence[Trial]]) -> int:
    return sum(map(len, rounds))


def _keep(trace: SearchTrace, folder: Path) -> None:
    try:
        write_result(place(trace.identity, folder), trace)
    except (OSError, UserError) as error:
        note(f"the choice of a plan is not kept for other comparisons: {error}")


def survivors(count: int) -> int:
    """How many of ``count`` candidates a round keeps."""
    return max(1, round(count * KEEP))


def search_images(candidates: int, rounds: Sequence[int]) -> int:
    """Images that a search makes in total."""
    total = 0
    for images in rounds:
        total += candidates * images
        candidates = survivors(candidates)
    return total


def _read(file: Path, identity: Mapping[str, Json]) -> list[list[Trial]]:
    """The trials of an earlier search of the same identity; empty without a readable one."""
    trace = read_earlier(SearchTrace, file)
    if trace is None or trace.identity != to_plain(identity):
        return []
    return trace.rounds
