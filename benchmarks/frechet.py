"""The Frechet distance at 2048 features against an implementation by ``scipy.linalg.sqrtm``.

The covariances are those of 4,096 random features with a decaying spectrum, like real features.
Both run on one thread, by the CPU clock: threads of BLAS wait for each other, so on a busy machine
several would measure the other processes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are imported

import click
import numpy as np
import torch
from scipy import linalg

from commands.help import SETTINGS
from metrics.frechet import frechet_distance
from runtime import cli

Moments = tuple[np.ndarray, np.ndarray]


def random_moments(dim: int, rng: np.random.Generator) -> Moments:
    """Mean and covariance of 2 ``dim`` random features, with a spread that falls as 1 / index."""
    mix = rng.standard_normal((dim, dim)) / np.sqrt(np.arange(1, dim + 1))[:, None]
    x = rng.standard_normal((2 * dim, dim)) @ mix + rng.standard_normal(dim)
    return x.mean(0), np.cov(x, rowvar=False)


def by_sqrtm(first: Moments, second: Moments) -> float:
    """The usual implementation: the matrix square root of the covariances' product."""
    root = linalg.sqrtm(first[1] @ second[1])
    trace = np.trace(first[1]) + np.trace(second[1]) - 2 * np.trace(np.real(root))
    return float(np.sum((first[0] - second[0]) ** 2) + trace)


class Compared(NamedTuple):
    """Both implementations on the same covariances."""

    seconds: tuple[float, float]  #: ours and SciPy's, medians
    values: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.seconds[1] / self.seconds[0]

    @property
    def difference(self) -> float:
        """Relative difference of the values."""
        return abs(self.values[0] / self.values[1] - 1)


def compared(dim: int, repeats: int) -> Compared:
    """Time both, in turn, on one thread."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    first, second = random_moments(dim, rng), random_moments(dim, rng)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(lambda: frechet_distance(*first, *second)))
        theirs.append(timed(lambda: by_sqrtm(first, second)))
    one, other = (statistics.median(t for t, _ in runs) for runs in (ours, theirs))
    return Compared((one, other), (ours[0][1], theirs[0][1]))


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Seconds that the call takes, and its value."""
    start = time.process_time()
    value = function()
    return time.process_time() - start, value


@click.command(context_settings=SETTINGS)
@click.option("--dim", type=click.IntRange(min=2), default=2048, help="number of features")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="calls of each")
def main(dim: int, repeats: int) -> None:
    """Time the Frechet distance against scipy.linalg.sqrtm on the same covariances.

    Prints the median time of both, their ratio (should be at least 10) and the relative difference
    of the results (should be at most 1e-9).
    """
    found = compared(dim, repeats)
    seconds, (value, expected) = found.seconds, found.values
    click.echo(f"{dim} features, median of {repeats}:")
    click.echo(f"  frechet_distance     {seconds[0]:8.2f} s   {value:.10g}")
    click.echo(f"  scipy.linalg.sqrtm   {seconds[1]:8.2f} s   {expected:.10g}")
    click.echo(f"  ratio                {found.ratio:8.1f}     (at least 10)")
    click.echo(f"  relative difference  {found.difference:8.1e}     (at most 1e-9)")


if __name__ == "__main__":
    cli.run(main)
