"""Network times by derivative-free search, with the closed form as the inner problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize

from ns.calibrate import Calibration, Latents, calibrate
from ns.losses import Loss, spectral
from ns.spectrum import Reduce, SpectralNorm
from plans.plan import Solve
from plans.table import tabulate
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.table import Table

#: Where the search starts: the inner nodes of a polynomial grid, and times of equal ratios in the
#: middle of the walk, where trajectories bend (as GITS finds, arXiv:2405.11326): n times from
#: exp(half) to exp(-half), half = HALF[0] + HALF[1] n, a fit to the best ones of the bundled model.
POLYNOMIAL, HALF = 7.0, (1.0, 0.31)
STEP = 0.2  #: first change of the logarithm of a time


def prior_table(times: Sequence[float], start: float, sigma_min: float) -> Table:
    """iPNDM(4) with a free first step on these network times, which are sorted: a table to 0."""
    nodes = torch.tensor([start, *sorted(times, reverse=True), sigma_min], dtype=torch.float64)
    table = tabulate((Solve(make_solver("ipndm"), nodes, afs=True),))
    return Table(start, 0.0, table.times, table.rows)


def polynomial_times(calls: int, sigma_min: float, sigma_max: float) -> list[float]:
    """The inner nodes of a grid of ``calls`` + 2 nodes: the levels of a solver with AFS."""
    return get_grid("polynomial", calls + 2, sigma_min, sigma_max, POLYNOMIAL)[1:-1].tolist()


def middle_times(calls: int, sigma_min: float, sigma_max: float) -> list[float]:
    """Times of equal ratios around 1, below ``sigma_max`` and above ``sigma_min``."""
    half = HALF[0] + HALF[1] * calls
    first, last = min(math.exp(half), 0.9 * sigma_max), max(math.exp(-half), 1.1 * sigma_min)
    return np.geomspace(first, last, calls).tolist()


@torch.no_grad()
def final_error(
    table: Table, latents: Latents, loss: Loss, reduce: Reduce = lambda _: None
) -> float:
    """Root of the mean loss of the table's images; negative where an unpaired term makes it so."""
    sums = torch.zeros(2, dtype=torch.float64)
    for curves, meter in latents.batches():
        *_, images = table.states(meter, curves.begin)
        error = loss(images, curves.images, meter.denoiser)
        sums += torch.tensor([float(error.double().sum()), len(error)], dtype=torch.float64)
    reduce(sums)
    mean = float(sums[0] / sums[1])
    return math.copysign(math.sqrt(abs(mean)), mean)


@torch.no_grad()
def search_times(
    calls: int,
    fit: Latents,
    judge: Latents,
    norm: SpectralNorm,
    evaluations: int,
    reduce: Reduce = lambda _: None,
    watch: Callable[[float], object] = lambda _: None,
) -> list[float]:
    """The times whose calibrated table is nearest to the teacher on the latents of ``judge``.

    Starts from the better of two guesses and goes on by Nelder and Mead's simplex in log sigma,
    within the teacher's noise levels, for at most ``evaluations`` calibrations in all.
    ``watch`` is called with the error of each.
    """
    levels = fit.curves[0].times
    high, low = float(levels[0]), float(levels[-1])

    def error(logs: np.ndarray) -> float:
        times = np.clip(np.exp(logs), low * 1.001, high * 0.999).tolist()
        if len(set(times)) < len(times):
            return float("inf")
        table = calibrated(times, fit, norm, reduce).table
        found = final_error(table, judge, spectral(norm), reduce)
        watch(found)
        return found

    guesses = [make(calls, low, high) for make in (middle_times, polynomial_times)][:evaluations]
    starts = [(error(np.log(guess)), np.log(guess)) for guess in guesses]
    least, best = min(starts, key=lambda start: start[0])
    left = evaluations - len(starts)
    if left >= calls:

        def known(logs: np.ndarray) -> float:
            return least if np.array_equal(logs, best) else error(logs)

        simplex = np.stack([best, *(best + STEP * unit for unit in np.eye(calls))])
        options = {"maxfev": left + 1, "initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-6}
        best = minimize(known, best, method="Nelder-Mead", options=options).x
    return sorted(np.clip(np.exp(best), low * 1.001, high * 0.999).tolist(), reverse=True)


def calibrated(
    times: Iterable[float], latents: Latents, norm: SpectralNorm, reduce: Reduce
) -> Calibration:
    """The calibration at these times, on the teacher's noise levels."""
    levels = latents.curves[0].times
    prior = prior_table([*times], float(levels[0]), float(levels[-1]))
    with torch.no_grad():
        return calibrate(prior, latents, norm, reduce)
