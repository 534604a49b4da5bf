"""Convert a published checkpoint, of a network or of a predictor, to safetensors.

Predictors are handled here, everything else by :mod:`denoisers.convert`.
"""

from __future__ import annotations

from pathlib import Path

import click

from amed.experiments import load_predictor, save_predictor
from checkpoints.pickles.files import read
from checkpoints.snapshots import is_predictor
from commands.help import SETTINGS
from denoisers.cards import card_file
from denoisers.convert import check_target, convert
from denoisers.settings import parse_settings
from runtime import cli
from runtime.errors import UserError
from runtime.outputs import check_writable

EXAMPLES = """\b
Examples:
  python -m tools.convert edm-ffhq-64x64-uncond-vp.pkl ffhq.safetensors --name ffhq
  python -m tools.convert 64x64.pt mine.safetensors \\
      --model_settings '{"image_size": 64, "num_head_channels": 64, "attention": "new"}'
  python -m tools.convert training-state-010000.pt mine.safetensors
  python -m tools.convert network-snapshot-000010.pkl exps/00001-theirs/predictor.safetensors
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--name", help="a published model, or a name of your own  [default: TARGET's stem]")
@click.option(
    "--model_settings", metavar="JSON", help="of the network, where SOURCE does not hold them"
)
def main(source: Path, target: Path, name: str | None, model_settings: str | None) -> None:
    """Convert the checkpoint SOURCE to TARGET.safetensors.

    For a network, or a bare state dict, also writes TARGET.card.json.  A predictor published by the
    AMED authors becomes a file like those of train.py, which --predictor_path takes.  Pickles are
    read as data; no code in them is run.
    """
    check_target(target)
    for file in (target, card_file(target)):
        if file.exists():
            raise UserError(f"{file} exists already: remove it, or give another TARGET")
    check_writable(target, "TARGET")
    content = read(source)
    if is_predictor(content):
        if model_settings is not None:
            raise UserError(f"{source} is a predictor: leave --model_settings out")
        student = load_predictor(str(source), source.parent)
        save_predictor(target, student.predictor, student.record)
        click.echo(f"wrote {target}")
        return
    written = convert(content, source, target, name, parse_settings(model_settings))
    for path in written:
        click.echo(f"wrote {path}")
    if len(written) == 1:
        click.echo(
            "no card: say with --name which published model the weights belong to, or with "
            "--model_settings what they do not tell of their network"
        )


if __name__ == "__main__":
    cli.run(main)
