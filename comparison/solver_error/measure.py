"""Measuring solver errors: the exact solutions, each row's distance to them, one seed's paths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comparison.rows import Row
from comparison.solver_error.exact import Exact
from comparison.solver_error.harness import ErrorHarness
from comparison.solver_error.plane import fit_plane
from comparison.solver_error.results import (
    ErrorIdentity,
    PlaneSummary,
    ShownTrajectory,
    SolutionsSummary,
    SolverErrorRow,
)
from comparison.solver_error.walks import WalkErrors, level, measure_errors, times, walk, walks
from denoisers.protocol import Model
from metrics.statistics import Statistics
from runtime.typed import read_earlier, to_plain, write_result
from solvers.grids import get_grid

CURVE = 33  #: points of a trajectory that its plane is fitted to, on the usual polynomial grid
ROWS = "errors"  #: folder of the measured rows

Tick = Callable[[int], object]


@dataclass(frozen=True)
class Solved:
    """The exact solutions of one problem, summarised."""

    exact: SolutionsSummary
    plane: PlaneSummary


def curve(levels: Collection[float]) -> list[float]:
    """The points of a trajectory: EDM's grid between the ends of ``levels``, 0 aside."""
    ends = min(t for t in levels if t > 0), max(levels)
    return [level(t) for t in get_grid("polynomial", CURVE, *ends, rho=7.0)]


def solve(harness: ErrorHarness, exact: Exact, seeds: str, tick: Tick) -> Solved:
    """Solve what is missing; the cost, the scale of features, and how plane trajectories are.

    ``seeds`` are those of the harness as they were written.
    """
    model, end, detector = exact.problem.model, exact.times[-1], harness.detector
    statistics = Statistics(detector.id, "exact") if detector else None
    points = curve(exact.times)
    spent, planes = 0.0, []
    for position, group in harness.own_groups:
        spent += exact.solve(group) * len(group)
        features = harness.features(exact.states(group, [end])[-1], model)
        if statistics is not None and features is not None:
            statistics.update(features)
        fits = [fit_plane(states) for states in exact.states(group, points).unbind(1)]
        shares = [[f.explained[0], sum(f.explained), f.rest, f.off] for f in fits]
        planes.append((position, torch.tensor(shares, dtype=torch.float64).T))
        tick(harness.finished(position))
    nfe = harness.here.sum_(torch.tensor([spent], dtype=torch.float64))
    scale = None if statistics is None else math.sqrt(2 * float(statistics.reduce().cov.trace()))
    own = exact.identity([])
    summary = SolutionsSummary(
        model=own.model,
        model_sha256=own.model_sha256,
        guidance_rate=own.guidance_rate,
        start=own.start,
        dtype=own.dtype,
        tol=own.tol,
        nfe=float(nfe) / len(harness.seeds),
        seeds=seeds,
        detector=detector.name if detector else None,
        detector_sha256=detector.sha256 if detector else None,
        feature_scale=scale,
    )
    return Solved(summary, _plane_summary(harness, planes, len(points)))


def _plane_summary(
    harness: ErrorHarness, planes: Iterable[tuple[int, Tensor]], points: int
) -> PlaneSummary:
    one, both, rest, off = harness.gather(planes, 4)
    return PlaneSummary(
        points=points,
        one_mean=float(one.mean()),
        both_mean=float(both.mean()),
        rest_mean=float(rest.mean()),
        both_least=float(both.min()),
        off_most=float(off.max()),
    )


def measure_row(
    row: Row, exact: Exact, harness: ErrorHarness, folder: Path, tick: Tick
) -> SolverErrorRow:
    """The errors of one row; read back if the same row was measured before."""
    file = folder / ROWS / f"{row.key}.json"
    identity = _identity(row, exact, harness)
    earlier = read_earlier(SolverErrorRow, file)
    if earlier is not None and earlier.identity == identity:
        tick(len(harness.seeds))
        return earlier
    begin = time.perf_counter()
    levels = times(walks(row.sampler))
    whole = harness.gather(_distances(row, exact, harness, tick), 2 * len(levels))
    along, local, features = whole[: len(levels)], whole[len(levels) : -1], whole[-1]
    detected = harness.detector is not None
    result = SolverErrorRow(
        method=row.method,
        group=row.group,
        budget=row.budget,
        detail=row.detail,
        key=row.key,
        n=len(harness.seeds),
        nfe_planned=row.sampler.nfe,
        nfe_metered=row.sampler.nfe,  # checked in `_distances`
        x=float(along[-1].mean()),
        x_error=_standard_error(along[-1]),
        features=float(features.mean()) if detected else None,
        features_error=_standard_error(features) if detected else None,
        seconds=time.perf_counter() - begin,
        times=tuple(levels),
        along=tuple(along.mean(1).tolist()),
        local=tuple(local.mean(1).tolist()),
        identity=identity,
    )
    if harness.here.is_main:
        write_result(file, result)
    return result


def _distances(
    row: Row, exact: Exact, harness: ErrorHarness, tick: Tick
) -> Iterator[tuple[int, Tensor]]:
    """For each of this process's groups, along the walk, by interval, and in features."""
    solves = walks(row.sampler)
    for position, group in harness.own_groups:
        errors = measure_errors(solves, exact, group)
        if errors.nfe != row.sampler.nfe:
            raise RuntimeError(
                f"{row.method} spent {errors.nfe} NFE where its plan says {row.sampler.nfe}"
            )
        features = _feature_distance(harness, errors, exact.problem.model)
        yield position, torch.cat([errors.along, errors.local, features[None]])
        tick(harness.finished(position))


def _feature_distance(harness: ErrorHarness, errors: WalkErrors, model: Model) -> Tensor:
    """(B,), zeros without a detector."""
    own = harness.features(errors.states[-1], model)
    truth = harness.features(errors.truth[-1], model)
    if own is None or truth is None:
        return torch.zeros(errors.states.shape[1], dtype=torch.float64)
    return (own - truth).norm(dim=1)


def _identity(row: Row, exact: Exact, harness: ErrorHarness) -> ErrorIdentity:
    described = to_plain(row.sampler.describe())  # equal to its copy on disk
    detector = harness.detector.sha256 if harness.detector else None
    return ErrorIdentity(described, exact.identity(harness.groups), detector)


def _standard_error(values: Tensor) -> float:
    """Of the mean over images; 0 for a single image."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def shown_trajectory(harness: ErrorHarness, exact: Exact, rows: Sequence[Row]) -> ShownTrajectory:
    """The first seed's exact trajectory in its plane, and those of ``rows``, which share it."""
    group = harness.groups[0]
    levels = curve(exact.times)
    states = exact.states(group, levels)[:, 0]
    plane = fit_plane(states)

    def projected(states: Tensor) -> tuple[tuple[float, float], ...]:
        return tuple((float(a), float(b)) for a, b in plane.project(states))

    paths = {}
    for row in rows:
        path = walk(walks(row.sampler), *exact.problem.begin(group[:1]))
        paths[row.key] = projected(path[:, 0])
    return ShownTrajectory(
        seed=group[0],
        times=tuple(levels),
        explained=plane.explained,
        rest=plane.rest,
        off=plane.off,
        exact=projected(states),
        rows=paths,
    )
