"""Sample a model without a solver's error, by dopri5 on the probability-flow ODE.

What a perfect deterministic solver would make of the same seeds, and so the floor that a model
sets to all of them.  ``--dest`` writes statistics of the samples, a second reference for the tables
of compare.py and sweep.py, and needs no images on disk; ``--outdir`` keeps one PNG per seed.  The
step size is controlled for a batch as a whole, so an image depends on its neighbours within the
tolerance.  A killed run goes on where it stopped.

Examples:

    python -m tools.converged --dest mine-converged.npz --dataset_name mine --model_path FILE
    python compare.py --dataset_name mine --model_path FILE --ref mine.npz \\
        --ref_model mine-converged.npz
    python -m tools.converged --seeds 0-9999 --outdir samples/converged
    torchrun --standalone --nproc_per_node=2 -m tools.converged --dest mine-converged.npz
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from denoisers.conditions import Conditions
from denoisers.precision import DTYPES
from denoisers.prior import start
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from evaluation.converged import COMMAND, Converged
from evaluation.images import open_detector
from evaluation.passes import ImageStream, gathered
from metrics.detectors import DETECTORS, Detector
from metrics.summary import Requirements
from runtime import cli
from runtime.dist import World, world
from runtime.errors import UserError
from runtime.files import cache_folder
from runtime.images import to_uint8
from runtime.log import progress
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from runtime.seeds import CONVERGED_START, parse_seeds
from samplers.folder import FREE, Folder
from samplers.generate import SampleBatch
from solvers.driver import Meter
from solvers.oracle import dopri5

#: Options that the rest of a record names, or the statistics.
NAMED = ("dataset_name", "detector", "detector_path")
SEEDS = f"{CONVERGED_START}-{CONVERGED_START + 9999}"


@torch.inference_mode()
def converged(
    model: Model, seeds: tuple[int, ...], tol: float, dtype: torch.dtype, device: torch.device
) -> SampleBatch:
    """The ODE's images of ``seeds``, from sigma_max to sigma_min, and one Euler step to 0."""
    card, noise = model.card, SeedNoise(seeds)
    meter = Meter(Conditions().bind(model, noise, device))
    ts = torch.tensor([card.sigma_max, card.sigma_min], dtype=torch.float64)
    x = start(card, noise, card.sigma_max, dtype, device)
    x = dopri5(meter, x, ts, rtol=tol, atol=tol).x[-1]
    x = meter(x, ts[-1]).x0
    return SampleBatch(seeds, x, meter.nfe, model.decode(x), None)


@dataclass(frozen=True)
class Work:
    """How this process solves its share."""

    model: Model
    tol: float
    dtype: torch.dtype  #: of the state
    share: int  #: images that are solved together on each process
    here: World
    #: Evaluations of all images so far, and how many images.
    spent: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def batches(self, seeds: Sequence[int]) -> Iterator[SampleBatch]:
        """This process's part of ``seeds``."""
        mine = self.here.shard(seeds)
        for i in range(0, len(mine), self.share):
            some = tuple(mine[i : i + self.share])
            made = converged(self.model, some, self.tol, self.dtype, self.here.device)
            self.spent.add_(torch.tensor([made.nfe * len(some), len(some)]))
            yield made

    def nfe(self) -> float:
        """Mean number of evaluations of an image on all processes, called on all of them."""
        nfe, count = self.here.sum_(self.spent.clone()).tolist()
        return nfe / max(count, 1)


def images(outdir: Path, seeds: Sequence[int], record: RunRecord, work: Work) -> str:
    """Make the images that the folder lacks; says so."""
    here, folder = work.here, Folder(outdir)
    about, missing = _opened(folder, seeds, record, here)
    with progress(len(missing), "dopri5", "img", enabled=here.is_main) as bar:
        for made in work.batches(missing):
            folder.save(made)
            bar.update(min(len(made.seeds) * here.size, len(missing) - bar.n))
    nfe = work.nfe()
    if here.is_main and missing:
        folder.close(about, round(nfe))
    return f"{outdir}: {len(missing)} images made, {nfe:.1f} NFE each on average"


def reference(
    dest: Path, outdir: Path | None, seeds: Sequence[int], record: RunRecord, work: Work,
    detector: Detector,
) -> str:  # fmt: skip
    """Write statistics of the images, and the images too where there is a folder; says so."""
    here, folder = work.here, None if outdir is None else Folder(outdir)
    about = record if folder is None else _opened(folder, seeds, record, here)[0]

    def batches(first: int, bar: tqdm[Any]) -> Iterator[Tensor]:
        for made in work.batches(seeds[first:]):
            if folder is not None:
                folder.save(made)
            yield torch.from_numpy(to_uint8(made.images)).permute(0, 3, 1, 2)

    identity = {"model": record.model, "plan": record.plan, "seeds": record.options["seeds"],
                "dtype": record.options["dtype"], "outdir": str(outdir)}  # fmt: skip
    name = f"{work.model.card.name}, converged"
    stream = ImageStream(name, len(seeds), work.share, identity, batches)
    cache = cache_folder(record.options["cache_dir"])
    with gathered(stream, [detector], Requirements(), 0, here, cache) as summaries:
        nfe = work.nfe()
        if here.is_main:
            plan = {**record.plan, "nfe_metered": nfe or None}
            Converged(summaries[0].moments, dataclasses.replace(record, plan=plan)).save(dest)
            if folder is not None:
                folder.close(about, round(nfe))
    return f"wrote {dest}  (detector {detector.name}, N = {len(seeds)}, {nfe:.1f} NFE on average)"


def _opened(
    folder: Folder, seeds: Sequence[int], record: RunRecord, here: World
) -> tuple[RunRecord, list[int]]:
    """Of ``Folder.open``, on every process."""
    opened = folder.open(record, seeds) if here.is_main else None
    return here.broadcast_object(opened) or (record, [])


def is_made(dest: Path, record: RunRecord, detector: Detector) -> bool:
    """Whether the statistics are there already; UserError where ``dest`` holds others."""
    if not dest.exists():
        return False
    older = Converged.load(dest)
    plan = {**older.record.plan, "nfe_metered": record.plan["nfe_metered"]}
    free = tuple({*FREE, "cache_dir"} - {"seeds"})
    differences = record.differences(dataclasses.replace(older.record, plan=plan), free)
    if older.statistics.detector != detector.id:
        differences.append(f"detector: {detector.id} != {older.statistics.detector}")
    if differences:
        raise UserError(
            f"{dest} holds statistics of other settings (now and there: {differences[0]}): give "
            "another --dest, or remove it"
        )
    return True


def check(numbers: Sequence[int], outdir: Path | None, dest: Path | None) -> None:
    """Raise UserError where nothing is asked for, or a reference of seeds that tables report on."""
    if outdir is None and dest is None:
        raise UserError(
            "nothing to make: give --dest FILE.npz, --outdir FOLDER for images, or both"
        )
    if dest is None:
        return
    if dest.suffix != ".npz":
        raise UserError(f"--dest {dest} has to end in .npz, by which statistics are known")
    if len(numbers) < 2:
        raise UserError("statistics need at least 2 images: give more --seeds")
    if min(numbers) < CONVERGED_START:
        raise UserError(
            f"--seeds {min(numbers)} and others below {CONVERGED_START} are those of tables and "
            f"of selections: a reference takes others, such as {SEEDS}"
        )


@click.command(context_settings={"show_default": True})
@click.option("--dataset_name", default="cifar10-small", help="model")
@cli.model_options
@cli.seeds_option(SEEDS)
@cli.batch_option(128)
@click.option("--tol", type=click.FloatRange(0, min_open=True), default=1e-4, help="rtol = atol")
@click.option("--dest", type=click.Path(path_type=Path), help=".npz of statistics to write")
@click.option("--outdir", type=click.Path(path_type=Path), help="folder of the images, to be kept")
@click.option("--detector", type=click.Choice(list(DETECTORS)), default="cifar10-small")
@click.option("--detector-path", "detector_path", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="of the network")
@cli.device_option
@cli.dry_run_option
def main(
    dry_run: bool, device: str | None, seeds: str, tol: float, outdir: Path | None,
    dest: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Sample a model to convergence: statistics (--dest), images (--outdir), or both."""
    numbers = parse_seeds(seeds)
    check(numbers, outdir, dest)
    with world(device) as here:
        source, dtype = ModelSource.from_options(options), DTYPES[options["dtype"]]
        Conditions().check(source.card(), numbers)
        model = source.load(options["dtype"], here)
        kept = {k: v for k, v in options.items() if k not in NAMED}
        kept |= {"seeds": seeds, "outdir": outdir and str(outdir)}
        plan = {"solver": "dopri5", "tol": tol, "nfe_metered": None}
        identity = {"name": model.card.name, "sha256": model.sha256}
        record = RunRecord.make(COMMAND, kept, identity, plan)
        if dry_run:
            return click.echo(record.to_json()) if here.is_main else None
        share = -(-options["batch"] // here.size)
        work = Work(model, tol, torch.promote_types(dtype, torch.float32), share, here)
        detector = None if dest is None else open_detector(options, here)
        if dest is None or detector is None or is_made(dest, record, detector):
            said = [] if dest is None else [f"{dest} is there already"]
            said += [] if outdir is None else [images(outdir, numbers, record, work)]
        else:
            said = [reference(dest, outdir, numbers, record, work, detector)]
        if here.is_main:
            click.echo("\n".join(said))


if __name__ == "__main__":
    cli.run(main)
