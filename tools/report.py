"""Write report.html anew from the results of a comparison.

Example:

    python tools/report.py samples/compare
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from comparison.page import write_page  # noqa: E402
from runtime import cli  # noqa: E402


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """FOLDER is the --outdir of compare.py or errors.py."""
    click.echo(write_page(folder))


if __name__ == "__main__":
    cli.run(main)
