"""Hand a sampler to other programs: diffusers, ComfyUI, sigma strings, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from commands.help import SETTINGS
from commands.numbers import POSITIVE, nodes
from commands.options import PATH, Name, combine, guidance_options, model_options, times_option
from export.files import (
    Export,
    ExportOptions,
    destination,
    markdown,
    sigma_string,
    write_node,
    write_scheduler,
)
from ns.experiments import save_table
from runtime import cli
from runtime.options import parse_options
from solvers.grids import SCHEDULES
from solvers.registry import CLASSIC

EXAMPLES = """\b
Examples:
  python -m tools.export diffusers --predictor_path 1 --dest my-scheduler
  python -m tools.export comfyui --predictor_path 1 --dest my_table.py
  python -m tools.export sigmas --sampler ipndm --nfe 6 --dataset_name mine --model_path FOLDER
  python -m tools.export table --predictor_path 1 --dest table.json
"""
F = TypeVar("F", bound=Callable[..., Any])

#: Which sampler, under the names of sample.py.
sampler_options: Callable[[F], F] = combine(
    click.option("--predictor_path", metavar="RUN", help="number of a run in exps/, or a file"),
    click.option("--sampler", type=Name("sampler", CLASSIC), help="instead of a trained one"),
    click.option("--dataset_name", metavar="NAME", help="model  [default: the predictor's]"),
    model_options,
    click.option("--nfe", type=nodes(1), help="network evaluations"),
    click.option("--num_steps", type=nodes(2), help="grid nodes, instead of --nfe"),
    click.option("--afs", type=bool, help="free analytical first step  [default: False]"),
    click.option("--schedule_type", type=Name("schedule", SCHEDULES), help="[default: polynomial]"),
    click.option("--schedule_rho", type=POSITIVE, help="exponent"),
    times_option("noise levels one by one, decreasing, instead of a schedule"),
    click.option("--max_order", type=click.IntRange(1, 4), help="of a multistep solver"),
    guidance_options,
)


@click.group(epilog=EXAMPLES, context_settings=SETTINGS)
def main() -> None:
    """Hand a sampler to other programs, which need nothing of this toolkit.

    A trained table, or any classic sampler, is a list of numbers.  A predictor is not, since its
    times depend on the image.
    """


@main.command()
@click.option("--dest", type=PATH, required=True, metavar="FOLDER", help="to write")
@sampler_options
def diffusers(**flags: Any) -> None:
    """A scheduler of diffusers: its settings, and the one file that reads them."""
    click.echo(write_scheduler(_export(flags)))


@main.command()
@click.option("--dest", type=PATH, required=True, metavar="FILE", help=".py to write")
@sampler_options
def comfyui(**flags: Any) -> None:
    """A file with two nodes for ComfyUI, the numbers inside."""
    click.echo(write_node(_export(flags)))


@main.command()
@sampler_options
def sigmas(**flags: Any) -> None:
    """The noise levels as one line, for programs that take levels but no weights."""
    click.echo(sigma_string(_export(flags)))


@main.command()
@click.option("--dest", type=PATH, metavar="FILE", help="also write JSON, with the record")
@sampler_options
def table(**flags: Any) -> None:
    """The numbers themselves, as Markdown."""
    export = _export(flags)
    if export.options.dest is not None:
        save_table(destination(export), export.table, export.record())
    click.echo(markdown(export))


def _export(flags: dict[str, Any]) -> Export:
    return Export.of(parse_options(ExportOptions, flags))


if __name__ == "__main__":
    cli.run(main)
