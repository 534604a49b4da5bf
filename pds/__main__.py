"""Masks for preconditioned diffusion sampling, from images.

Example:

    python -m pds fit --data cifar10-32x32-train.zip --dest masks/cifar10
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch import Tensor
from tqdm import tqdm

from commands.options import batch_option, dry_run_option
from image_data.sources import count_images, image_batches
from pds.masks import Masks, fit
from runtime import cli
from runtime.files import atomic_write
from runtime.log import progress
from runtime.record import RunRecord

PATH = click.Path(path_type=Path)


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Masks for sample.py --sampler=pds."""


@main.command("fit")
@click.option("--data", type=PATH, required=True, help="folder or zip of images")
@click.option("--num", type=click.IntRange(2), help="of that many images, drawn  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, help="of the draw")
@click.option("--dest", type=PATH, required=True, help="folder for freq.npy and space.npy")
@batch_option(256)
@dry_run_option
def fit_command(dry_run: bool, **options: Any) -> None:
    """Write the frequency and the space mask of images, as published.

    The images have to be of the size of the model's samples.
    """
    data, num, dest = options["data"], options["num"], options["dest"]
    total = count_images(data, num)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    record = RunRecord.make("pds fit", plain, {}, {"images": total})
    if dry_run:
        return click.echo(record.to_json())
    with progress(total, "fit", "img") as bar:
        batches = image_batches(data, options["batch"], num=num, seed=options["seed"])
        masks = fit(_seen(batches, bar))
    for path in write(masks, dest):
        click.echo(str(path))
    record.write(dest / "run.json")


def write(masks: Masks, folder: Path) -> tuple[Path, Path]:
    """Write ``freq.npy`` and ``space.npy``, (1, C, H, W) float32, each whole or not at all."""
    paths = (folder / "freq.npy", folder / "space.npy")
    for path, mask in zip(paths, (masks.freq, masks.space), strict=True):
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.save(file, mask[None].float().numpy())
    return paths


def _seen(batches: Iterator[Tensor], bar: tqdm[Any]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update(len(batch))


if __name__ == "__main__":
    cli.run(main)
