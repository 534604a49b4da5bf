"""Convert a published image data set to EDM's layout.

The result is a zip (or a folder) of RGB images of one square size, ``00000/img00000000.png`` and so
on, and ``dataset.json`` with their classes, as read by the other tools here and by EDM's training.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from commands.help import SETTINGS
from image_data.formats import CONVERTIBLE
from image_data.raw.dataset import RawDataset
from image_data.raw.opening import open_raw
from image_data.writer import SquareShape, WrittenImages, destination, write_dataset
from runtime import cli
from runtime.bounds import MOST_IMAGES, MOST_SIDE

PATH = click.Path(path_type=Path)
EXAMPLES = """\b
Examples:
  python -m tools.dataset_tool --source cifar-10-python.tar.gz --dest data/cifar10-32x32-train.zip
  python -m tools.dataset_tool --source cifar-10-python.tar.gz --split test \\
      --dest data/cifar10-32x32-test.zip
  python -m tools.dataset_tool --source imagenet/train --dest data/imagenet-64x64.zip \\
      --resolution 64 --transform center-crop
  python -m tools.dataset_tool --source train-images-idx3-ubyte.gz --dest data/mnist-32x32.zip \\
      --resolution 32
"""


def report(dest: Path, source: RawDataset, written: WrittenImages) -> None:
    """Print what was written, and what was left out or enlarged."""
    size = f"{written.side}x{written.side}"
    click.echo(f"wrote {dest}: {len(written.labels)} images of {size}, {source.classes}")
    if written.skipped:
        click.echo(f"skipped because they cannot be read: {written.skipped}")
    if written.enlarged:
        click.echo(f"enlarged to {size}: {written.enlarged}, first {written.first_enlarged}")
    if source.left_out:
        endings = ", ".join(sorted(CONVERTIBLE))
        click.echo(f"left out because they do not end in {endings}: {source.left_out}")


def parse_resolution(_context: object, _option: object, text: str | None) -> int | None:
    """``64`` or ``64x64``."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x\1)?", text)
    if not match or int(match[1]) > MOST_SIDE:
        raise click.BadParameter(
            f"'{text}' is not a square size up to {MOST_SIDE}: give it as 64 or 64x64"
        )
    return int(match[1])


@click.command(context_settings=SETTINGS, epilog=EXAMPLES)
@click.option(
    "--source", type=PATH, required=True, help="folder, zip, CIFAR-10 tarball, or idx file"
)
@click.option("--dest", type=PATH, required=True, help="NAME.zip or a folder")
@click.option(
    "--resolution", callback=parse_resolution, metavar="N", help="64 or 64x64  [default: keep]"
)
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop"]),
    default="none",
    help="before resizing",
)
@click.option(
    "--max-images", type=click.IntRange(1, MOST_IMAGES), help="use the first N  [default: all]"
)
@click.option("--skip-broken", is_flag=True, help="omit images that cannot be read")
@click.option("--split", type=click.Choice(["train", "test"]), help="of CIFAR-10  [default: train]")
def main(
    source: Path, dest: Path, resolution: int | None, transform: str, max_images: int | None,
    skip_broken: bool, split: str | None,
) -> None:  # fmt: skip
    """Convert a published image data set to EDM's layout.

    --source is a folder or a zip of images, cifar-10-python.tar.gz, or the images of an idx data
    set (MNIST). Classes are those of its dataset.json, else its top sub-folders in sorted order.
    --dest is only written when it is complete.
    """
    shape = SquareShape(resolution, crop=transform == "center-crop")
    with open_raw(source, split) as images, destination(dest) as write:
        written = write_dataset(images, write, shape, max_images, skip_broken)
    report(dest, images, written)


if __name__ == "__main__":
    cli.run(main)
