"""Sampling time over NFE times one raw network forward: what the solver algebra costs.

The raw forward is the bare U-Net on inputs that are ready in its dtype; sampling is `integrate`
through the denoiser, preconditioning and casts included.  Every round times forward, sampling,
forward, so a change of the machine's speed meets both sides; a row gives medians over the rounds.

    python -m benchmarks.sampling                            batch 64 and 256 in bfloat16
    python -m benchmarks.sampling --threads 1 --clock cpu    on a machine that others use too

Exit code 1 if a ratio is above the limit (1.05).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from denoisers.families.edm import EDMModel
from denoisers.precision import DTYPES
from denoisers.registry import load_model
from solvers.driver import integrate, planned_nfe
from solvers.grids import get_grid
from solvers.registry import make_solver

LIMIT = 1.05
#: Solver and number of nodes: five or six evaluations each.
ROWS = (("euler", 6), ("ipndm", 6), ("dpmpp", 6), ("heun", 4))


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Stopwatch:
    """Seconds of an action by the chosen clock, the device's queue included."""

    clock: Callable[[], float]
    device: torch.device

    def __call__(self, action: Callable[[], object]) -> float:
        self._wait()
        begin = self.clock()
        action()
        self._wait()
        return self.clock() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def raw_forward(model: EDMModel, batch: int, device: torch.device) -> Callable[[], object]:
    """The bare U-Net on inputs that are ready: no preconditioning, no casts."""
    network, size = model.net.model, model.card.resolution
    images = torch.randn(batch, model.card.channels, size, size).to(device, model.net.dtype)
    levels = torch.zeros(1, device=device)
    return lambda: network(images, levels)


def sampler(model: EDMModel, name: str, nodes: int, start: Tensor) -> tuple[Callable, int]:
    solver, denoiser = make_solver(name), model.bind()
    ts = get_grid("polynomial", nodes, 0.002, 80.0, 7)
    return lambda: integrate(solver, denoiser, start, ts), planned_nfe(solver, ts)


Row = tuple[str, int, float, float, float]


def measure(model: EDMModel, batch: int, rounds: int, watch: Stopwatch) -> Iterator[Row]:
    """Yield (solver, NFE, seconds of a forward, seconds of sampling, ratio), medians."""
    start = 80.0 * torch.randn(batch, model.card.channels, *2 * [model.card.resolution])
    start = start.to(watch.device)
    forward = raw_forward(model, batch, watch.device)
    watch(forward)  # the first call prepares kernels
    for name, nodes in ROWS:
        sample, nfe = sampler(model, name, nodes, start)
        forwards, samples, ratios = [], [], []
        for _ in range(rounds):
            before, taken, after = watch(forward), watch(sample), watch(forward)
            forwards += [before, after]
            samples.append(taken)
            ratios.append(taken / (nfe * (before + after) / 2))
        median = statistics.median
        yield name, nfe, median(forwards), median(samples), median(ratios)


@click.command(help=__doc__)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(64, 256))
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: torch's own choice.")
@click.option("--clock", type=click.Choice(sorted(CLOCKS)), default="wall", show_default=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bfloat16", show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    batches: tuple[int, ...], rounds: int, threads: int | None, clock: str, dtype: str, device: str
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = load_model("cifar10-small", device=device, dtype=dtype)
    assert isinstance(model, EDMModel)
    watch, worst = Stopwatch(CLOCKS[clock], torch.device(device)), 0.0
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
    main()
