"""The pages of --help, for `commands.help`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from commands.app import COMMANDS, load
from commands.help import WIDTH
from tools.docs_tables.options import program


def table() -> str:
    """The page of every command and subcommand, under a line ``## python ...``."""
    return "\n".join(page for name in COMMANDS for page in _pages(name))


def _pages(name: str) -> Iterator[str]:
    command, title = load(name), program(name)
    context = click.Context(
        command,
        info_name=title if "-m " in title else title.removeprefix("python "),
        terminal_width=WIDTH - 2,
        **command.context_settings,
    )
    yield f"## {title}\n{command.get_help(context)}"
    if isinstance(command, click.Group):
        for sub, child in command.commands.items():
            inner = click.Context(
                child, context, sub, terminal_width=WIDTH - 2, **child.context_settings
            )
            yield f"## {title} {sub}\n{child.get_help(inner)}"
