"""All benchmarks in one run: ratios of times measured in turn, so that a busy machine matters less.

``python -m benchmarks`` prints a table and writes it as JSON.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import torch

from benchmarks.suite.figures import Figure
from benchmarks.suite.parts import SUITE, SuiteSettings, figures
from commands.help import SETTINGS
from commands.options import dtype_option
from runtime import cli
from runtime.log import note
from runtime.typed import write_result

EXAMPLES = """\b
Examples:
  python -m benchmarks                        (twenty minutes on an idle machine)
  python -m benchmarks --only sampling --only peers --dtype bfloat16
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--only", type=click.Choice(list(SUITE)), multiple=True, help="may be repeated")
@click.option("--batch", type=click.IntRange(1), default=64, help="images at once")
@click.option("--rounds", type=click.IntRange(1), default=5, help="measurements")
@dtype_option
@click.option("--dest", type=click.Path(path_type=Path), default=Path("samples/benchmarks.json"))
def main(only: tuple[str, ...], batch: int, rounds: int, dtype: str, dest: Path) -> None:
    """Measure speed and memory; see the top of this file."""
    asked = SuiteSettings(batch, rounds, dtype)
    found: list[Figure] = []
    spawn = multiprocessing.get_context("spawn")
    click.echo("| benchmark | | median | wanted |\n|---|---|---:|---|")
    for name in only or SUITE:
        with ProcessPoolExecutor(1, mp_context=spawn) as alone:  # nothing is left from the last one
            some = alone.submit(figures, name, asked).result()
        for figure in some:
            click.echo(figure.row)
        found += some
        write_result(dest, {"settings": asked, "torch": torch.__version__, "figures": found})
    note(f"{dest}")


if __name__ == "__main__":
    cli.run(main)
