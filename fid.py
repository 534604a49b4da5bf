"""Frechet distance of images to reference statistics, and making such statistics.

Examples:

    python fid.py calc --images samples/00001 --num 2000 --json fid.json
    python fid.py ref --data cifar10-32x32-train.zip --dest stats.npz
    torchrun --standalone --nproc_per_node=2 fid.py calc --images images.zip --num_images 5000
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from metrics.detectors import DETECTORS, Detector, detector_entry, load_detector, load_reference
from metrics.fid import gather
from metrics.sources import count_images, image_batches
from metrics.statistics import Statistics
from runtime import cli
from runtime.dist import World, world
from runtime.errors import UserError
from runtime.files import atomic_write, cache_folder, download
from runtime.log import progress
from runtime.record import RunRecord

PATH = click.Path(path_type=Path)


def open_detector(options: Mapping[str, Any], world: World) -> Detector:
    """The detector of the options; a published file is fetched into the cache once, by rank 0."""
    name, path = options["detector"], options["detector_path"]
    url, folder = detector_entry(name).url, cache_folder(options["cache_dir"])
    if path is None and url is not None:
        path = world.broadcast_object(download(url, folder) if world.is_main else None)
    return load_detector(name, path=path, device=world.device)


def image_statistics(
    path: Path, detector: Detector, world: World, batch: int, num: int | None, seed: int
) -> Statistics:
    """Statistics of the images in a folder or zip, summed over all ranks."""
    share = -(-batch // world.size)
    total = count_images(path, num)
    with progress(total, path.name, "img", enabled=world.is_main) as bar:

        def watched() -> Iterator[Tensor]:
            for images in image_batches(path, share, (world.rank, world.size), num, seed):
                yield images
                bar.update(min(len(images) * world.size, total - bar.n))

        return gather(watched(), detector, path.name).reduce()


def common_options(function: Any) -> Any:
    """The options that ``calc`` and ``ref`` share."""
    for option in (
        cli.dry_run_option,
        cli.device_option,
        cli.cache_option,
        cli.batch_option(256),
        click.option("--seed", type=int, default=0, help="draws the N images"),
        # torchrun takes --num for a prefix of its own options, hence the longer name
        click.option("--num", "--num_images", type=click.IntRange(min=2), help="use N images"),
        click.option("--detector-path", type=PATH, help="file of a detector that is not bundled"),
        click.option("--detector", type=click.Choice([*DETECTORS]), default="cifar10-small"),
    ):
        function = option(function)
    return function


def record_of(command: str, options: dict[str, Any]) -> RunRecord:
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return RunRecord.make(command, plain, {}, {})


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Frechet distances of images, with the detector's name beside every figure."""


@main.command()
@click.option("--images", type=PATH, required=True, help="folder, zip, or .npz of statistics")
@click.option("--ref", default="cifar10-small", help="bundled name, or .npz")
@click.option("--json", "result_path", type=PATH, help="write the result to this file")
@common_options
def calc(dry_run: bool, **options: Any) -> None:
    """FID of images, or of saved statistics, to a reference."""
    record, images, num = record_of("fid calc", options), options["images"], options["num"]
    if dry_run:
        return click.echo(record.to_json())
    with world(options["device"]) as w:
        detector = open_detector(options, w)
        reference = load_reference(options["ref"], detector)
        if images.suffix == ".npz":
            if num is not None:
                raise UserError(f"--num {num} draws images, but {images} holds statistics: omit it")
            stats = Statistics.load(images)
        else:
            stats = image_statistics(images, detector, w, options["batch"], num, options["seed"])
        result = {
            "fid": stats.fid(reference),
            "n": stats.n,
            "detector": asdict(detector.id),
            "reference": {"source": reference.source, "n": reference.n},
            "record": asdict(record),
        }
        if w.is_main:
            click.echo(f"FID {result['fid']:.6g}  (detector {detector.name}, N = {stats.n})")
            if options["result_path"]:
                with atomic_write(options["result_path"]) as temporary:
                    temporary.write_text(json.dumps(result, indent=2) + "\n")


@main.command()
@click.option("--data", type=PATH, required=True, help="folder or zip; or .npz of mu and sigma")
@click.option("--dest", type=PATH, required=True, help=".npz to write")
@common_options
def ref(dry_run: bool, **options: Any) -> None:
    """Statistics of images, to compare with later.

    Published statistics that hold mu and sigma alone become a reference when you state which
    detector (--detector) and how many images (--num) made them.
    """
    if dry_run:
        return click.echo(record_of("fid ref", options).to_json())
    data, dest, num = options["data"], options["dest"], options["num"]
    if dest.suffix != ".npz":
        raise UserError(f"--dest {dest} has to end in .npz, by which statistics are known")
    with world(options["device"]) as w:
        detector = open_detector(options, w)
        if data.suffix == ".npz":
            if num is None:
                raise UserError(f"{data} does not say how many images it is of: add --num")
            stats = Statistics.adopt(data, detector.id, num)
        else:
            stats = image_statistics(data, detector, w, options["batch"], num, options["seed"])
        if w.is_main:
            with atomic_write(dest) as file:
                stats.save(file)
            click.echo(f"wrote {dest}  (detector {detector.name}, N = {stats.n})")


if __name__ == "__main__":
    cli.run(main)
