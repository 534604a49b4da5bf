"""Write the generated tables of the documentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from commands.help import SETTINGS
from runtime import cli
from runtime.errors import UserError
from tools.docs_tables import api, help, models, options, orders, pages

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = """\b
Examples:
  python -m tools.docs_tables                 # all tables
  python -m tools.docs_tables options --check
"""


class PageTable(NamedTuple):
    """A generated table and its page."""

    page: str  #: relative to the root of the repository
    make: Callable[[], str]


#: By the name in the markers of the page.
TABLES: dict[str, PageTable] = {
    "api": PageTable("docs/api.md", api.table),
    "help": PageTable("commands/help.txt", help.table),
    "models": PageTable("docs/models.md", models.table),
    "options": PageTable("docs/options.md", options.table),
    "orders": PageTable("docs/solvers.md", orders.table),
}


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("names", nargs=-1, type=click.Choice(list(TABLES)))
@click.option("--check", is_flag=True, help="write nothing; fail if a table is out of date")
def main(names: tuple[str, ...], check: bool) -> None:
    """Write the generated tables of the documentation, all of them or those called NAMES.

    A table lies between the lines <!-- NAME:begin --> and <!-- NAME:end --> of its page.
    """
    outdated = []
    for name in names or TABLES:
        page, make = TABLES[name]
        table = make()
        if pages.current(ROOT / page, name) == table:
            continue
        outdated.append(f"{name} in {page}")
        if not check:
            pages.replace(ROOT / page, name, table)
    if check and outdated:
        raise UserError(
            f"out of date: {', '.join(outdated)}; run python -m tools.docs_tables to rewrite them"
        )
    click.echo("\n".join(f"wrote {table}" for table in outdated) or "all tables are up to date")


if __name__ == "__main__":
    cli.run(main)
