"""The cost of the trainers: their time over the time of the network calls that they make.

One update of `amed.trainer.train`, from drawing the noise to saving the state, is compared with as
many calls of the bare U-Net on inputs that already have its dtype: forward alone for the teacher
and for the nodes of the student's grid, forward and backward to the input for the inserted nodes.
So is one update of `ns.refine.refine`, all of whose calls have a backward pass.
Each round times network calls, the trainer, network calls, so that changes in the machine's speed
affect both; a row gives medians over the rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import click
import torch
from torch import Tensor

from amed.batches import Data, TaughtBatches
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from amed.step import Student
from amed.trainer import Loop, train
from benchmarks.sampling import (
    Stopwatch,
    clock_options,
    network_options,
    open_bundled,
    raw_forward,
)
from commands.help import SETTINGS
from denoisers.families.edm import EDMModel
from ns.coordinates import WhitenedTable
from ns.losses import spectral
from ns.refine import Pair, RefineLoop, refine
from ns.search import polynomial_times, prior_table
from ns.spectrum import SpectralNorm
from runtime import cli
from runtime.dist import World
from runtime.record import RunRecord
from solvers.table import Table
from solvers.types import Denoised, Denoiser
from teachers.build import build_teacher

EXAMPLES = """\b
Examples:
  python -m benchmarks.training                            (a batch of 64 in bfloat16)
  python -m benchmarks.training --threads 1 --clock cpu    (on a machine in use)
"""
LIMIT = 1.15  #: of the ratio
#: Student, teacher and M, at five evaluations per sample, as published.
ROWS = (("amed", "heun", 1), ("ipndm", "ipndm", 2))


@dataclass(eq=False)
class Counter:
    """Counts the calls of a denoiser, apart for those with a gradient to their input."""

    inner: Denoiser
    cost: int = 1
    forwards: int = 0
    backwards: int = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        if x.requires_grad or sigma.requires_grad:
            self.backwards += 1
        else:
            self.forwards += 1
        return self.inner(x, sigma)


def raw_backward(model: EDMModel, batch: int, device: torch.device) -> Callable[[], object]:
    """A call of the bare U-Net and its gradient with respect to images and noise levels."""
    network, size = model.net.model, model.card.resolution
    images = model.net.inputs(torch.randn(batch, model.card.channels, size, size))
    levels = torch.zeros(batch, device=device)
    images.requires_grad_(), levels.requires_grad_()
    ones = torch.ones_like(images)

    def call() -> None:
        torch.autograd.grad(network(images, levels)[0], (images, levels), ones)

    return call


def trainer(
    model: EDMModel, row: tuple[str, str, int], batch: int, device: torch.device
) -> Callable[[Denoiser], None]:
    """A function that does one update of a new run, in a folder of its own, with a denoiser."""
    name, tea, inserted = row
    card = model.card
    settings = StudentSettings(
        *(card.name, name, 4, card.sigma_min, card.sigma_max, tea, inserted),
        afs=True,
        scale_dir=0.01,
        scale_time=0.2,
    )
    refined = settings.grid.refined(settings.M)
    teacher = build_teacher(tea, *refined, solver=settings.teacher_solver())
    student = Student(settings.solver(), settings.grid.nodes(), settings.afs)
    record = RunRecord.make("train", settings.to_options(), {}, {})
    loop = Loop(total=batch, batch=batch, micro=batch, tick=batch, snap=0, lr=5e-3)

    def update(denoiser: Denoiser) -> None:
        data = Data(lambda noise, stream: denoiser, card, 0, torch.float32, device)
        predictor = AMEDPredictor(0.01, 0.2, seed=0).to(device)
        out, err = contextlib.redirect_stdout(StringIO()), contextlib.redirect_stderr(StringIO())
        with tempfile.TemporaryDirectory() as folder, out, err:
            world = World(0, 1, device)
            batches = TaughtBatches(data, teacher)
            train(predictor, student, batches, loop, world, Path(folder), record)

    return update


def refiner(model: EDMModel, batch: int, device: torch.device) -> Callable[[Denoiser], None]:
    """A function that does one update of an NS solver of five calls with a denoiser."""
    card = model.card
    times = polynomial_times(5, card.sigma_min, card.sigma_max)
    table = prior_table(times, card.sigma_max, card.sigma_min)
    seen = torch.ones_like(table.rows).tril()  # by each row
    directions = 1e-3 * seen[:, :, None] * seen[:, None, :]
    x, images = torch.randn(2, batch, *card.shape).to(device)
    loss = spectral(SpectralNorm.of([images], 0.6))
    loop = RefineLoop(updates=1, batch=batch, report=1, lr=0.05)

    def update(denoiser: Denoiser) -> None:
        pair = Pair(card.sigma_max * x, images, denoiser)
        start = WhitenedTable(table, directions)
        out, err = contextlib.redirect_stdout(StringIO()), contextlib.redirect_stderr(StringIO())
        with tempfile.TemporaryDirectory() as folder, out, err:
            here, path = World(0, 1, device), Path(folder)
            pairs, numbers = (lambda _: iter([pair])), range(batch)
            refine(start, pairs, numbers, _no_error, loss, loop, path, here, _no_error)

    return update


def _no_error(table: Table) -> float:
    """In the place of judging and of saving a table."""
    return 0.0


Row = tuple[str, str, int, int, float, float, float, float]


def measure(model: EDMModel, batch: int, rounds: int, watch: Stopwatch) -> Iterator[Row]:
    """Measure every row of `ROWS`.

    Yields student, teacher, calls without and with backward, seconds of both, seconds of an update,
    and the ratio.
    """
    forward, backward = (raw(model, batch, watch.device) for raw in (raw_forward, raw_backward))

    def raw() -> tuple[float, float]:
        with torch.no_grad():
            first = watch(forward)
        return first, watch(backward)

    raw()  # the first call prepares kernels
    updates_of = {row[:2]: trainer(model, row, batch, watch.device) for row in ROWS}
    updates_of["ns", "stored"] = refiner(model, batch, watch.device)
    denoiser = model.bind()
    for row, update in updates_of.items():
        counter = Counter(denoiser)
        update(counter)
        f, b = counter.forwards, counter.backwards
        raws, updates, ratios = [], [], []
        for _ in range(rounds):
            before, taken, after = raw(), watch(lambda: update(denoiser)), raw()  # noqa: B023
            raws += [before, after]
            updates.append(taken)
            calls = sum(f * one + b * both for one, both in (before, after)) / 2
            ratios.append(taken / calls)
        one, both = (statistics.median(column) for column in zip(*raws, strict=True))
        median = statistics.median
        yield row[0], row[1], f, b, one, both, median(updates), median(ratios)


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--batch", type=click.IntRange(1), default=64, help="trajectories per update")
@click.option("--rounds", type=click.IntRange(1), default=7, help="measurements")
@clock_options
@network_options
def main(batch: int, rounds: int, threads: int | None, clock: str, dtype: str, device: str) -> None:
    """Time one update of the trainer over the network calls that it makes.

    The exit code is 1 if a ratio is above 1.15.
    """
    model, watch, worst = *open_bundled(threads, clock, dtype, device), 0.0
    click.echo("| student | teacher | forward | and backward | s | s | update, s | ratio |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for *cells, one, both, taken, ratio in measure(model, batch, rounds, watch):
        worst = max(worst, ratio)
        text = " | ".join(str(cell) for cell in cells)
        click.echo(f"| {text} | {one:.4f} | {both:.4f} | {taken:.3f} | {ratio:.3f} |")
    click.echo(f"largest ratio {worst:.3f}, limit {LIMIT}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    cli.run(main)
