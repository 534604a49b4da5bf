"""The cost of the solvers' own arithmetic: sampling time over NFE times one network forward.

The forward is that of the bare U-Net on inputs that already have its dtype; sampling is `integrate`
through the denoiser, including preconditioning and casts.  Each round times forward, sampling,
forward, so that changes in the machine's speed affect both; a row gives medians over the rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import click
import torch
from torch import Tensor

from commands.help import SETTINGS
from commands.options import threads_option
from denoisers.families.edm import EDMModel
from denoisers.precision import DTYPES
from denoisers.registry import load_model
from denoisers.speed import wait_for
from runtime import cli
from solvers.driver import integrate, planned_nfe
from solvers.grids import get_grid
from solvers.registry import make_solver

EXAMPLES = """\b
Examples:
  python -m benchmarks.sampling                            (batches of 64 and 256 in bfloat16)
  python -m benchmarks.sampling --threads 1 --clock cpu    (on a machine in use)
"""
LIMIT = 1.05  #: of the ratio
#: Solver and number of nodes, for five or six evaluations each.
ROWS = (("euler", 6), ("ipndm", 6), ("dpmpp", 6), ("heun", 4))


F = TypeVar("F", bound=Callable[..., Any])
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Stopwatch:
    """Seconds that an action takes by the chosen clock, including queued work of the device."""

    clock: Callable[[], float]
    device: torch.device

    def __call__(self, action: Callable[[], object]) -> float:
        wait_for(self.device)
        begin = self.clock()
        action()
        wait_for(self.device)
        return self.clock() - begin


def clock_options(command: F) -> F:
    """Add ``--threads`` and ``--clock``."""
    clocks = click.Choice(sorted(CLOCKS))
    clock = click.option("--clock", type=clocks, default="wall", help="wall time, or CPU time")
    return threads_option(clock(command))


def network_options(command: F) -> F:
    """Add ``--dtype`` and ``--device``."""
    dtypes = click.Choice(sorted(DTYPES))
    dtype = click.option("--dtype", type=dtypes, default="bfloat16", help="dtype of the network")
    device = click.option("--device", default="cpu", help="cuda, mps or cpu")
    return dtype(device(command))


def stopwatch(threads: int | None, clock: str, device: torch.device) -> Stopwatch:
    """Set the number of CPU threads, if it is given, and return a stopwatch of the clock."""
    if threads:
        torch.set_num_threads(threads)
    return Stopwatch(CLOCKS[clock], device)


def open_bundled(
    threads: int | None, clock: str, dtype: str, device: str
) -> tuple[EDMModel, Stopwatch]:
    """The bundled model and a stopwatch; random numbers start from seed 0."""
    watch = stopwatch(threads, clock, torch.device(device))
    torch.manual_seed(0)
    model = load_model("cifar10-small", device=device, dtype=dtype)
    assert isinstance(model, EDMModel)
    return model, watch


def raw_forward(model: EDMModel, batch: int, device: torch.device) -> Callable[[], object]:
    """A call of the bare U-Net on ready inputs, without preconditioning or casts."""
    network, size = model.net.model, model.card.resolution
    images = model.net.inputs(torch.randn(batch, model.card.channels, size, size))
    levels = torch.zeros(1, device=device)
    return lambda: network(images, levels)


def sampler(model: EDMModel, name: str, nodes: int, start: Tensor) -> tuple[Callable, int]:
    solver, denoiser = make_solver(name), model.bind()
    ts = get_grid("polynomial", nodes, 0.002, 80.0, 7)
    return lambda: integrate(solver, denoiser, start, ts), planned_nfe(solver, ts)


class Interleaved(NamedTuple):
    """Two actions that were timed in turn."""

    base: float  #: seconds, median
    taken: float  #: seconds of the other, median
    ratios: list[float]  #: ``taken / base`` of every round

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def interleaved(
    watch: Stopwatch, action: Callable[[], object], base: Callable[[], object], rounds: int
) -> Interleaved:
    """Time ``action``, and ``base`` before and after it in every round."""
    bases, times, ratios = [], [], []
    for _ in range(rounds):
        before, taken, after = watch(base), watch(action), watch(base)
        bases += [before, after]
        times.append(taken)
        ratios.append(2 * taken / (before + after))
    return Interleaved(statistics.median(bases), statistics.median(times), ratios)


Row = tuple[str, int, float, float, float]


def measure(model: EDMModel, batch: int, rounds: int, watch: Stopwatch) -> Iterator[Row]:
    """Yield (solver, NFE, seconds of a forward, seconds of sampling, ratio), medians."""
    start = 80.0 * torch.randn(batch, model.card.channels, *2 * [model.card.resolution])
    start = start.to(watch.device)
    forward = raw_forward(model, batch, watch.device)
    watch(forward)  # the first call prepares kernels
    for name, nodes in ROWS:
        sample, nfe = sampler(model, name, nodes, start)
        found = interleaved(watch, sample, forward, rounds)
        yield name, nfe, found.base, found.taken, found.ratio / nfe


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(64, 256),
    help="may be repeated",
)
@click.option("--rounds", type=click.IntRange(1), default=7, help="measurements")
@clock_options
@network_options
def main(
    batches: tuple[int, ...], rounds: int, threads: int | None, clock: str, dtype: str, device: str
) -> None:
    """Time sampling over NFE times one forward of the bare network.

    The exit code is 1 if a ratio is above 1.05.
    """
    model, watch, worst = *open_bundled(threads, clock, dtype, device), 0.0
    click.echo("| batch | solver | NFE | forward, s | sampling, s | ratio |")
    click.echo("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for batch in batches:
            for name, nfe, forward, taken, ratio in measure(model, batch, rounds, watch):
                worst = max(worst, ratio)
                cells = f"{batch} | {name} | {nfe} | {forward:.4f} | {taken:.3f} | {ratio:.3f}"
                click.echo(f"| {cells} |")
    click.echo(f"largest ratio {worst:.3f}, limit {LIMIT}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    cli.run(main)
