"""Write report.html again from the results in a folder."""

from __future__ import annotations

from pathlib import Path

import click

from commands.help import SETTINGS
from comparison.report.html import write_page
from runtime import cli

EXAMPLES = """\b
Example:
  python -m tools.report samples/compare
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write report.html again from the results in FOLDER.

    FOLDER is the --outdir of compare.py, solver_error.py or tools.nfe_sweep.
    """
    click.echo(write_page(folder))


if __name__ == "__main__":
    cli.run(main)
