"""What a table gains where its last rows may depend on the sample, or on the frequency.

* ``predictor``: the last two rows move with the bottleneck features of the network, through a
  network of 9,700 parameters whose heads begin at zero: a table joined with the idea of AMED
  (arXiv:2312.00094).  The rest of the table stays as it was trained.
* ``bands``: the last row has weights of its own for every ring of frequencies, in closed form.

Both are fitted on the latents that the table was trained on, and compared with it on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
import torch
from torch import Tensor, nn

from commands.help import SETTINGS
from commands.options import device_option, dtype_option
from denoisers.batch import SeededBatch
from denoisers.conditions import Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from metrics.detectors import load_detector
from metrics.fid import gather
from metrics.references import load_reference
from ns.calibrate import Latents, calibrate
from ns.coordinates import WhitenedTable
from ns.experiments import TrainedTable, load_student
from ns.job import CALIBRATED, NsJob, prepare
from ns.options import NsOptions
from ns.spectrum import SpectralNorm, rings
from runtime import cli
from runtime.dist import World, world
from runtime.errors import UserError
from runtime.images import to_uint8_tensor
from runtime.log import progress
from solvers.driver import Meter
from solvers.table import Table, combine
from solvers.types import Denoiser

EXAMPLES = """\b
Example:
  python -m benchmarks.ns_join --predictor_path 1 --num_images 1500
"""
BATCH = 32
LR = 3e-3


@dataclass(frozen=True, eq=False)
class Walked:
    """A batch of latents before the last call: what the last two rows are made from."""

    columns: tuple[Tensor, ...]  #: x_T, D_1 .. D_(K-1)
    features: Tensor  #: of the last of these calls
    images: Tensor  #: the teacher's; the latents themselves where there are none
    denoiser: Denoiser


class JoinedRows(nn.Module):
    """Changes of the last two rows in whitened coordinates, from bottleneck features."""

    def __init__(self, calls: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, 128), nn.SiLU())
        self.inner, self.last = nn.Linear(128, calls), nn.Linear(128, calls + 1)
        for head in (self.inner, self.last):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor, last: bool) -> Tensor:
        """(B, n), for the last row or the one before it."""
        head = self.last if last else self.inner
        delta: Tensor = head(self.encoder(features.flatten(1).float()))
        return delta.double()


@dataclass(frozen=True, eq=False)
class Experiment:
    """A trained table with the coordinates of its rows."""

    table: Table
    directions: Tensor  #: see `WhitenedTable`
    norm: SpectralNorm

    def walk(self, x: Tensor, images: Tensor, denoiser: Denoiser) -> Walked:
        """All calls but the last, without gradients."""
        with torch.no_grad():
            columns, features = [x], x
            for row, time in zip(self.table.rows[:-2], self.table.times[:-1], strict=True):
                made = Meter.of(denoiser)(combine(row, columns), time)
                columns.append(made.x0)
                if made.feat is None:
                    raise UserError("this model returns no bottleneck features")
                features = made.feat
        return Walked(tuple(columns), features, images, denoiser)

    def finish(self, walked: Walked, joined: JoinedRows | None) -> tuple[Tensor, list[Tensor]]:
        """The images, and the columns of the last row."""
        columns, features = [*walked.columns], walked.features
        calls = self.table.calls
        state = _sum(self._row(calls - 1, features, joined), columns)
        made = walked.denoiser(state, self.table.times[-1])
        columns.append(made.x0)
        return _sum(self._row(calls, made.feat, joined), columns), columns

    def _row(self, k: int, features: Tensor | None, joined: JoinedRows | None) -> Tensor:
        """The weights of row ``k``: (n,), or (B, n) where they depend on the sample."""
        row = self.table.rows[k, : k + 1]
        if joined is None:
            return row
        assert features is not None
        last = k == self.table.calls
        return row + joined(features, last) @ self.directions[k, : k + 1, : k + 1].T


def _sum(weights: Tensor, columns: Sequence[Tensor]) -> Tensor:
    if weights.ndim == 1:
        return combine(weights, columns)
    return torch.einsum("bn,nbchw->bchw", weights.to(columns[0]), torch.stack([*columns]))


def train(experiment: Experiment, data: Sequence[Walked], updates: int) -> JoinedRows:
    """The predictor after ``updates`` steps of Adam on the norm of the final error."""
    torch.manual_seed(0)
    joined = JoinedRows(experiment.table.calls, data[0].features[0].numel())
    optimizer = torch.optim.Adam(joined.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    with progress(updates, "training", "update") as bar:
        for update in range(updates):
            walked = data[update % len(data)]
            images, _ = experiment.finish(walked, joined)
            loss = experiment.norm(images - walked.images).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    return joined


class Bands:
    """A last row for every ring of frequencies: least squares on the columns of the table."""

    def __init__(self, experiment: Experiment, data: Sequence[Walked]) -> None:
        self.ring = rings(*data[0].images.shape[-2:])
        count, size = int(self.ring.max()) + 1, experiment.table.calls + 1
        gram = torch.zeros(count, size, size, dtype=torch.float64)
        product = torch.zeros(count, size, dtype=torch.float64)
        for walked in data:
            with torch.no_grad():
                _, columns = experiment.finish(walked, None)
            flat, target = self._spectra(torch.stack(columns)), self._spectra(walked.images[None])
            for r in range(count):
                mine, wanted = flat[..., self.ring == r], target[..., self.ring == r]
                mine, wanted = mine.flatten(1), wanted.flatten(1)
                gram[r] += (mine @ mine.mH).real
                product[r] += (mine @ wanted.mH).real[:, 0]
        scale = gram.diagonal(dim1=1, dim2=2).sqrt()
        unit = gram / scale[:, :, None] / scale[:, None] + 1e-9 * torch.eye(size)
        self.rows = torch.linalg.solve(unit, product / scale) / scale  # (R, K + 1)

    def __call__(self, columns: Sequence[Tensor]) -> Tensor:
        """The images of these columns."""
        weights = self.rows[self.ring].permute(2, 0, 1)  # (K + 1, H, W)
        spectra = self._spectra(torch.stack([*columns])) * weights[:, None, None]
        return torch.fft.ifft2(spectra.sum(0)).real

    @staticmethod
    def _spectra(images: Tensor) -> Tensor:
        return torch.fft.fft2(images.double())


def open_experiment(
    student: TrainedTable, model: Model, here: World
) -> tuple[Experiment, NsJob, Latents]:
    """The experiment on a trained table, the job of its training, and latents that are kept out."""
    options = student.record.options
    source = ModelSource(student.dataset_name, dtype=options["dtype"])
    count = max(int(options["trajectories"]), CALIBRATED)
    job = prepare(NsOptions(source, nfe=student.record.plan["nfe"], trajectories=count))
    fit, judge = job.latents(model, here)
    norm = SpectralNorm.of([c.images for c in fit.curves], job.options.norm_exponent)
    with torch.no_grad():
        directions = WhitenedTable.around(calibrate(student.table, fit, norm)).directions
    return Experiment(student.table, directions, norm), job, judge


def training_pairs(
    experiment: Experiment, job: NsJob, model: Model, here: World
) -> Iterator[Walked]:
    """The latents of the refinement, walked up to the last call."""
    stored = job.pairs.run(here, model)
    for batch in stored.batches(BATCH, range(job.split.judged, job.pairs.options.number)):
        denoiser = job.pairs.draw(model, batch.numbers, here).denoiser
        yield experiment.walk(batch.x[0], batch.x0[-1], denoiser)


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--predictor_path", required=True, metavar="RUN", help="a trained table")
@click.option("--updates", type=click.IntRange(1), default=300, help="of the predictor")
@click.option("--num_images", "num", type=click.IntRange(0), default=1500, help="for FID; 0: none")
@dtype_option
@device_option
def main(predictor_path: str, updates: int, num: int, dtype: str, device: str | None) -> None:
    """Try rows that depend on the sample or on the frequency, on a table of the bundled model."""
    student = load_student(predictor_path, "exps")
    if not isinstance(student, TrainedTable):
        raise UserError(f"--predictor_path {predictor_path} is no table: give a run of ns")
    with world(device) as here:
        model = ModelSource(student.dataset_name, dtype=dtype).load(here)
        experiment, job, judge = open_experiment(student, model, here)
        data = list(training_pairs(experiment, job, model, here))
        bands = Bands(experiment, data)
        joined = train(experiment, data, updates)
        held_out = [
            experiment.walk(curves.begin, curves.images, meter.denoiser)
            for curves, meter in judge.batches()
        ]
        errors = torch.zeros(3, dtype=torch.float64)
        for walked in held_out:
            made = three(experiment, walked, bands, joined)
            errors += torch.stack(
                [experiment.norm(m.double() - walked.images).mean().double() for m in made]
            )
        errors = (errors / len(held_out)).sqrt()
        fids = measured(experiment, model, num, bands, joined, here) if num else [None] * 3
        parameters = sum(p.numel() for p in joined.parameters())
        click.echo(f"{parameters} parameters in the predictor, {bands.rows.numel()} in the bands")
        for name, error, fid in zip(("table", "bands", "predictor"), errors, fids, strict=True):
            gain = 100 * (1 - float(error / errors[0]))
            ending = "" if fid is None else f", FID {fid:.2f}"
            click.echo(f"{name}: held out {float(error):.5f} ({gain:+.1f} % better){ending}")


@torch.no_grad()
def three(
    experiment: Experiment, walked: Walked, bands: Bands, joined: JoinedRows
) -> tuple[Tensor, Tensor, Tensor]:
    """The images of the table, with bands, and with the predictor."""
    images, columns = experiment.finish(walked, None)
    return images, bands(columns), experiment.finish(walked, joined)[0]


def measured(
    experiment: Experiment,
    model: Model,
    num: int,
    bands: Bands,
    joined: JoinedRows,
    here: World,
) -> list[float | None]:
    """FIDs of the three on the seeds from 0."""
    detector = load_detector("cifar10-small", device=here.device)
    reference = load_reference("cifar10-small", detector)
    images: tuple[list[Tensor], ...] = ([], [], [])
    with progress(num, "images", "img") as bar:
        for first in range(0, num, BATCH):
            seeds = range(first, min(first + BATCH, num))
            drawn = SeededBatch.open(model, Conditions(), seeds, torch.float32, here.device)
            x = drawn.start(experiment.table.start)
            walked = experiment.walk(x, x, drawn.denoiser)
            for kept, made in zip(images, three(experiment, walked, bands, joined), strict=True):
                kept.append(to_uint8_tensor(made))
            bar.update(len(seeds))
    return [gather(kept, detector).fid(reference) for kept in images]


if __name__ == "__main__":
    cli.run(main)
