"""Sample a model without solver error, by dopri5 on the probability-flow ODE.

These samples are what an exact deterministic solver would make of the same seeds, so their FID is
the limit that the model sets to every such solver.
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
from denoisers.prior import start
from denoisers.registry import DTYPES, Model, ModelSource
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

#: Options that are recorded elsewhere: in the record's model, or in the statistics.
NAMED = ("dataset_name", "detector", "detector_path")
SEEDS = f"{CONVERGED_START}-{CONVERGED_START + 9999}"
EXAMPLES = """\b
Examples:
  python -m tools.converged --dest mine-converged.npz --dataset_name mine --model_path FILE
  python compare.py --dataset_name mine --model_path FILE --ref mine.npz \\
      --ref_model mine-converged.npz
  python -m tools.converged --seeds 0-9999 --outdir samples/converged
  torchrun --standalone --nproc_per_node=2 -m tools.converged --dest mine-converged.npz
"""


@torch.inference_mode()
def converged(
    model: Model, seeds: tuple[int, ...], tol: float, dtype: torch.dtype, device: torch.device
) -> SampleBatch:
    """Images of ``seeds`` by the ODE from sigma_max to sigma_min, and one Euler step to 0.

    ``tol`` is both the relative and the absolute tolerance of dopri5.  Its step size is controlled
    for the batch as a whole, so an image depends on its neighbours, within the tolerance.
    """
    card, noise = model.card, SeedNoise(seeds)
    meter = Meter(Conditions().bind(model, noise, device))
    ts = torch.tensor([card.sigma_max, card.sigma_min], dtype=torch.float64)
    x = start(card, noise, card.sigma_max, dtype, device)
    x = dopri5(meter, x, ts, rtol=tol, atol=tol).x[-1]
    x = meter(x, ts[-1]).x0
    return SampleBatch(seeds, x, meter.nfe, model.decode(x), None)


@dataclass(frozen=True)
class Work:
    """How this process samples its share of the seeds."""

    model: Model
    tol: float
    dtype: torch.dtype  #: of the state
    share: int  #: images per batch on each process
    here: World
    #: Network evaluations summed over the images so far, and the number of those images.
    spent: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def batches(self, seeds: Sequence[int]) -> Iterator[SampleBatch]:
        """Sample this process's part of ``seeds``, batch by batch."""
        mine = self.here.shard(seeds)
        for i in range(0, len(mine), self.share):
            some = tuple(mine[i : i + self.share])
            made = converged(self.model, some, self.tol, self.dtype, self.here.device)
            self.spent.add_(torch.tensor([made.nfe * len(some), len(some)]))
            yield made

    def nfe(self) -> float:
        """Mean evaluations per image over all processes; every process has to call it."""
        nfe, count = self.here.sum_(self.spent.clone()).tolist()
        return nfe / max(count, 1)


def images(outdir: Path, seeds: Sequence[int], record: RunRecord, work: Work) -> str:
    """Make the images that ``outdir`` lacks; returns a sentence that says so."""
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
    """Write statistics of the images to ``dest``, and the images to ``outdir`` unless it is None.

    Returns a sentence that says so.
    """
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
    """What ``Folder.open`` returns on rank 0, on every process."""
    opened = folder.open(record, seeds) if here.is_main else None
    return here.broadcast_object(opened) or (record, [])


def is_made(dest: Path, record: RunRecord, detector: Detector) -> bool:
    """Whether ``dest`` holds these statistics already.

    Raises UserError where it holds statistics of other settings.
    """
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
            f"{dest} holds statistics of other settings (now and in the file: {differences[0]}): "
            "give another --dest, or remove the file"
        )
    return True


def check(numbers: Sequence[int], outdir: Path | None, dest: Path | None) -> None:
    """Raise UserError where neither output is asked for, or a reference would reuse seeds.

    Statistics serve as a reference for tables, so they must not share seeds with them.
    """
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
            f"--seeds {min(numbers)} and others below {CONVERGED_START} are used by tables and "
            f"selections: give a reference other seeds, such as {SEEDS}"
        )


@click.command(epilog=EXAMPLES, context_settings={"show_default": True})
@click.option("--dataset_name", default="cifar10-small", help="name of the model")
@cli.model_options
@cli.seeds_option(SEEDS)
@cli.batch_option(128)
@click.option(
    "--tol",
    type=click.FloatRange(0, min_open=True),
    default=1e-4,
    help="relative and absolute tolerance of dopri5",
)
@click.option("--dest", type=click.Path(path_type=Path), help="write statistics to this .npz")
@click.option("--outdir", type=click.Path(path_type=Path), help="keep the images in this folder")
@click.option(
    "--detector", type=click.Choice(list(DETECTORS)), default="cifar10-small", help="for --dest"
)
@click.option(
    "--detector-path",
    "detector_path",
    type=click.Path(path_type=Path),
    help="file of a detector that is not bundled",
)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float32", help="dtype of the network"
)
@cli.device_option
@cli.dry_run_option
def main(
    dry_run: bool, device: str | None, seeds: str, tol: float, outdir: Path | None,
    dest: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Sample a model without solver error, by dopri5 on the probability-flow ODE.

    --dest writes statistics of the samples, the second reference of compare.py and of
    tools.nfe_sweep, without keeping images; --outdir keeps one PNG per seed.  Run the same command
    again to continue after an interruption.
    """
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
