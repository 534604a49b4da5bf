"""The options of all commands, as click declares them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click

from commands.app import COMMANDS, load
from tools.docs_tables.pages import markdown

HEAD = ("option", "default", "meaning")
#: A default that the help text states itself.
STATED = re.compile(r"\s*\[default: (.*)\]$")


def table() -> str:
    """A section with a table for every command and subcommand."""
    return "\n\n".join(section for name in COMMANDS for section in _sections(name))


def program(name: str) -> str:
    """How the command called ``name`` is run from a clone of the repository."""
    package, _, stem = COMMANDS[name].module.partition(".")
    return f"python {stem}.py" if package == "commands" else f"python -m {package}.{stem}"


def _sections(name: str) -> Iterator[str]:
    command = load(name)
    if not isinstance(command, click.Group):
        yield _section(program(name), f"amed {name}", command)
        return
    for sub, child in command.commands.items():
        yield _section(f"{program(name)} {sub}", f"amed {name} {sub}", child)


def _section(title: str, alias: str, command: click.Command) -> str:
    summary = (command.help or "").partition("\n")[0]
    rows = [row(parameter, command) for parameter in command.params]
    return f"## `{title}`\n\nAlso `{alias}`.  {summary}\n\n{markdown(HEAD, rows)}"


def row(parameter: click.Parameter, command: click.Command) -> tuple[str, str, str]:
    """Flags, default and meaning of an option or argument of ``command``."""
    if isinstance(parameter, click.Argument):
        return f"`{parameter.make_metavar(click.Context(command))}`", "required", ""
    assert isinstance(parameter, click.Option)
    flags = f"`{'`, `'.join([*parameter.opts, *parameter.secondary_opts])}`"
    if parameter.metavar:
        flags = f"{flags[:-1]} {parameter.metavar}`"
    meaning = _line(parameter.help or "")
    stated = STATED.search(meaning)
    meaning = STATED.sub("", meaning)
    if isinstance(parameter.type, click.Choice):
        choices = "one of " + ", ".join(f"`{choice}`" for choice in parameter.type.choices)
        meaning = f"{meaning}; {choices}" if meaning else choices
    default = stated[1] if stated else _default(parameter, command)
    return flags, default, meaning


def _default(option: click.Option, command: click.Command) -> str:
    if option.required:
        return "required"
    value: Any = option.to_info_dict()["default"]
    value = (command.context_settings.get("default_map") or {}).get(option.name, value)
    if value is None or (option.is_flag and not option.secondary_opts) or value == "":
        return ""
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(f"`{one}`" for one in values)


def _line(text: str) -> str:
    """``text`` on one line, and nothing in it taken for HTML."""
    return " ".join(text.split()).replace("<", "\\<")
