"""Draw a reproducible subset of the prompts in a file."""

from __future__ import annotations

import csv
import io
from hashlib import sha256
from pathlib import Path

import click

from commands.help import SETTINGS
from commands.numbers import SEED, images
from image_data.prompts import COLUMN, read_prompts
from runtime import cli
from runtime.errors import UserError
from runtime.files import atomic_write

EXAMPLES = """\b
Example:
  python -m tools.draw_prompts data/MS-COCO_val2014_30k_captions.csv data/coco-5k.csv
"""


def draw(count: int, number: int, seed: int) -> list[int]:
    """Indices of ``number`` out of ``count`` rows, without replacement, in the order of the draw.

    Rows are ordered by the SHA-256 of ``<seed> <row>``, which does not depend on any library's
    random generator; a smaller draw is the beginning of a larger one.
    """
    return sorted(range(count), key=lambda row: sha256(f"{seed} {row}".encode()).digest())[:number]


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--number", type=images(1), default=5000, help="prompts to draw")
@click.option("--seed", type=SEED, default=0, help="seed of the draw")
def main(source: Path, target: Path, number: int, seed: int) -> None:
    """Draw a reproducible subset of the prompts in a file.

    SOURCE is a CSV with a column 'text', or a text file with one prompt per line.  TARGET.csv gets
    the columns 'row' (index in SOURCE, from 0) and 'text', as --prompt_path takes it.  The draw is
    the same on every machine.
    """
    prompts = read_prompts(source)
    if target.suffix.lower() != ".csv":
        raise UserError(f"{target} would not be read as a CSV file: give it the suffix .csv")
    if number > len(prompts):
        raise UserError(f"{source} has {len(prompts)} prompts: give --number {len(prompts)}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", COLUMN])
    writer.writerows([row, prompts[row]] for row in draw(len(prompts), number, seed))
    content = text.getvalue().encode()
    if target.exists() and target.read_bytes() != content:
        raise UserError(f"{target} exists with other content: remove it, or give another name")
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    click.echo(f"wrote {target}: {number} of {len(prompts)} prompts")


if __name__ == "__main__":
    cli.run(main)
