"""Fit the masks of preconditioned diffusion sampling (PDS) to images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from commands.help import SETTINGS
from commands.numbers import SEED, images
from commands.options import PATH, batch_option, dry_run_option
from image_data.sources import count_images, image_batches
from pds.masks import Masks, fit
from runtime import cli
from runtime.dist import World
from runtime.files import atomic_write
from runtime.log import progress
from runtime.outputs import claimed
from runtime.record import RECORD, RunRecord
from runtime.typed import to_plain

EXAMPLES = """\b
Example:
  python -m tools.fit_masks --data cifar10-32x32-train.zip --dest masks/cifar10
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--data", type=PATH, required=True, help="folder or zip of images")
@click.option("--num", type=images(2), help="draw this many images  [default: use all]")
@click.option("--seed", type=SEED, default=0, help="seed of that draw")
@click.option("--dest", type=PATH, required=True, help="folder for freq.npy and space.npy")
@batch_option(256)
@dry_run_option
def main(dry_run: bool, **options: Any) -> None:
    """Fit the frequency mask and the space mask of PDS to images.

    Follows the published definition (arXiv:2207.02196, section 4).  The images must have the size
    of the model's samples.
    """
    data, num, dest = options["data"], options["num"], options["dest"]
    total = count_images(data, num)
    record = RunRecord.make("fit_masks", to_plain(options), {}, {"images": total})
    if dry_run:
        return click.echo(record.to_json())
    alone = World(0, 1, torch.device("cpu"))
    with claimed(dest, alone, "fit_masks"), progress(total, "fit", "img") as bar:
        batches = image_batches(data, options["batch"], num=num, seed=options["seed"])
        masks = fit(_counted(batches, bar))
        for path in write(masks, dest):
            click.echo(str(path))
        record.write(dest / RECORD)


def write(masks: Masks, folder: Path) -> tuple[Path, Path]:
    """Write ``freq.npy`` and ``space.npy``, float32 of shape (1, C, H, W), each atomically."""
    paths = (folder / "freq.npy", folder / "space.npy")
    for path, mask in zip(paths, (masks.freq, masks.space), strict=True):
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.save(file, mask[None].float().numpy())
    return paths


def _counted(batches: Iterator[Tensor], bar: tqdm[Any]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update(len(batch))


if __name__ == "__main__":
    cli.run(main)
