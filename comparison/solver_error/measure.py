"""Solving, walking and measuring what an :class:`SolverErrorJob` lays out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from comparison.report.html import closing_line, write_page
from comparison.rows import Row
from comparison.solver_error.exact import Exact
from comparison.solver_error.job import SolverErrorJob, curve
from comparison.solver_error.plane import fit_plane
from comparison.solver_error.report import by_error, markdown, write_errors
from comparison.solver_error.walks import WalkErrors, measure_errors, times, walk, walks
from denoisers.protocol import Model
from metrics.statistics import Statistics
from runtime.errors import UserError
from runtime.files import read_earlier, write_json
from runtime.log import progress


def run(job: SolverErrorJob) -> str:
    """Solve, measure and report; returns the table and where the report lies."""
    world, exacts = job.world, job.exacts
    if not exacts:
        raise UserError("no row is left that solves the ODE: add classic solvers or predictors")
    if world.is_main:
        job.record.write(job.folder / "errors-run.json")
    total = len(job.seeds) * (len(exacts) + len(job.rows))
    with progress(total, "exact solutions", "img", enabled=world.is_main) as bar:
        about = [_solve(job, exact, bar.update) for exact in exacts]
        results = []
        for row, exact in job.rows.values():
            bar.set_description(f"{row.method} at {row.sampler.nfe} NFE")
            results.append(_row(job, row, exact, bar.update))
    world.barrier()
    if not world.is_main:
        return ""
    content = {
        "record": json.loads(job.record.to_json()),
        "exact": about[0]["exact"],
        "plane": about[0]["plane"],
        "rows": by_error(results),
        "skipped": job.skipped,
        "trajectory": _trajectory(job),
    }
    files = write_errors(job.folder, content)
    return "\n".join([markdown(content), *map(str, files), closing_line(write_page(job.folder))])


def _solve(job: SolverErrorJob, exact: Exact, tick: Callable[[int], object]) -> dict[str, Any]:
    """Solve what is missing; the price, the scale of features, and how plane trajectories are."""
    model, ends = exact.problem.model, exact.times[-1]
    stats = Statistics(job.detector.id, "exact") if job.detector else None
    points = curve(exact.times)
    spent, planes = 0.0, []
    for place, seeds in job.mine:
        spent += exact.solve(seeds) * len(seeds)
        features = job.features(exact.states(seeds, [ends])[-1], model)
        if stats is not None and features is not None:
            stats.update(features)
        fits = [fit_plane(states) for states in exact.states(seeds, points).unbind(1)]
        figures = [[f.explained[0], sum(f.explained), f.rest, f.off] for f in fits]
        planes.append((place, torch.tensor(figures, dtype=torch.float64).T))
        tick(job.finished(place))
    one, both, rest, off = job.gather(iter(planes), 4)
    nfe = job.world.sum_(torch.tensor([spent], dtype=torch.float64))
    scale = None if stats is None else math.sqrt(2 * float(stats.reduce().cov.trace()))
    return {
        "exact": {
            **exact.problem.describe(),
            "tol": exact.tol,
            "nfe": float(nfe) / len(job.seeds),
            "seeds": job.record.options["seeds"],
            "detector": job.detector.name if job.detector else None,
            "detector_sha256": job.detector.sha256 if job.detector else None,
            "feature_scale": scale,
        },
        "plane": {
            "points": len(points),
            "one_mean": float(one.mean()),
            "both_mean": float(both.mean()),
            "rest_mean": float(rest.mean()),
            "both_least": float(both.min()),
            "off_most": float(off.max()),
        },
    }


def _row(
    job: SolverErrorJob, row: Row, exact: Exact, tick: Callable[[int], object]
) -> dict[str, Any]:
    """The figures of one row; read back if the same row was measured before."""
    file = job.folder / "errors" / f"{row.key}.json"
    identity = json.loads(json.dumps(_identity(job, row, exact)))
    found = read_earlier(file)
    if found is not None and found["identity"] == identity:
        tick(len(job.seeds))
        return found
    solves = walks(row.sampler) or []
    levels = times(solves)
    nfe = row.sampler.nfe

    def measured() -> Iterator[tuple[int, Tensor]]:
        for place, seeds in job.mine:
            found = measure_errors(solves, exact, seeds)
            if found.nfe != nfe:
                raise RuntimeError(f"{row.method} spent {found.nfe} NFE where its plan says {nfe}")
            far = _feature_distance(job, found, exact.problem.model)
            yield place, torch.cat([found.along, found.local, far[None]])
            tick(job.finished(place))

    begin = time.perf_counter()
    whole = job.gather(measured(), 2 * len(levels))
    along, local, far = whole[: len(levels)], whole[len(levels) : -1], whole[-1]
    result = {
        "method": row.method,
        "group": row.group,
        "budget": row.budget,
        "detail": row.detail,
        "key": row.key,
        "n": len(job.seeds),
        "nfe_planned": nfe,
        "nfe_metered": nfe,
        "x": float(along[-1].mean()),
        "x_error": _standard_error(along[-1]),
        "features": float(far.mean()) if job.detector else None,
        "features_error": _standard_error(far) if job.detector else None,
        "seconds": time.perf_counter() - begin,
        "times": levels,
        "along": along.mean(1).tolist(),
        "local": local.mean(1).tolist(),
        "identity": identity,
    }
    if job.world.is_main:
        write_json(file, result)
    return result


def _feature_distance(job: SolverErrorJob, found: WalkErrors, model: Model) -> Tensor:
    """(B,), zeros without a detector."""
    mine, truth = job.features(found.states[-1], model), job.features(found.truth[-1], model)
    if mine is None or truth is None:
        return torch.zeros(found.states.shape[1], dtype=torch.float64)
    return (mine - truth).norm(dim=1)


def _identity(job: SolverErrorJob, row: Row, exact: Exact) -> dict[str, Any]:
    detector = job.detector.sha256 if job.detector else None
    solutions = {**exact.problem.describe(), "tol": exact.tol, "groups": job.groups}
    return {"sampler": row.sampler.describe(), "exact": solutions, "detector_sha256": detector}


def _standard_error(values: Tensor) -> float:
    """Of the mean over images; 0 for a single image."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _trajectory(job: SolverErrorJob) -> dict[str, Any]:
    """The first seed's exact trajectory in its plane, and those of the rows that share it."""
    exact, group = job.exacts[0], job.groups[0]
    levels = curve(exact.times)
    states = exact.states(group, levels)[:, 0]
    plane = fit_plane(states)
    paths = {}
    for key, (row, theirs) in job.rows.items():
        if theirs is exact and row.budget is not None:
            path = walk(walks(row.sampler) or [], *exact.problem.begin(group[:1]))
            paths[key] = plane.project(path[:, 0]).tolist()
    return {
        "seed": group[0],
        "times": levels,
        "explained": list(plane.explained),
        "rest": plane.rest,
        "off": plane.off,
        "exact": plane.project(states).tolist(),
        "rows": paths,
    }
