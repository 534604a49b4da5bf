"""Turn any published checkpoint, predictors included, into safetensors with its settings.

What it does to predictors is here, the rest is :mod:`denoisers.convert`.
"""

from __future__ import annotations

from pathlib import Path

import click

from amed.experiments import load_predictor, save_predictor
from checkpoints.snapshots import is_predictor, read
from denoisers.convert import check_target, convert, report
from runtime import cli

EXAMPLES = """\b
Examples:
  python -m tools.convert edm-ffhq-64x64-uncond-vp.pkl ffhq.safetensors --name ffhq
  python -m tools.convert network-snapshot-000010.pkl exps/00001-theirs/predictor.safetensors
"""


@click.command(epilog=EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--name", help="a published model, or a name of your own  [default: the target's]")
def main(source: Path, target: Path, name: str | None) -> None:
    """Turn the checkpoint SOURCE into TARGET.safetensors.

    A network, or plain weights, gets TARGET.card.json beside it.  A predictor of the AMED authors
    becomes what train.py writes, so that --predictor_path takes it.  Pickles are read as data;
    nothing in them is run.
    """
    check_target(target)
    content = read(source)
    if not is_predictor(content):
        report(convert(source, target, name, content))
        return
    student = load_predictor(str(source), source.parent)
    predictor, record = student.predictor, student.record
    save_predictor(target, predictor, record)
    click.echo(f"wrote {target}")


if __name__ == "__main__":
    cli.run(main)
