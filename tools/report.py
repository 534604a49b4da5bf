"""Write report.html again from the results of a comparison.

Example:

    python -m tools.report samples/compare
"""

from __future__ import annotations

from pathlib import Path

import click

from comparison.report.html import write_page
from runtime import cli


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """FOLDER is the --outdir of compare.py or solver_error.py."""
    click.echo(write_page(folder))


if __name__ == "__main__":
    cli.run(main)
