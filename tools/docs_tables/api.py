"""The table of the names that ``import amed`` offers."""

from __future__ import annotations

import inspect
import re

import amed
from tools.docs_tables.pages import markdown


def table() -> str:
    """Name, first sentence of the docstring, and place of definition, in alphabetical order."""
    rows = [(f"`amed.{name}`", summary(name), place(name)) for name in amed.NAMES]
    return markdown(("name", "what it is", "defined in"), rows)


def summary(name: str) -> str:
    """The first line of the docstring.  Raises ValueError where there is none."""
    text = inspect.getdoc(getattr(amed, name))
    if not text:
        raise ValueError(f"amed.{name} has no docstring")
    return re.sub(r":\w+:`", "`", text.splitlines()[0].replace("``", "`"))


def place(name: str) -> str:
    """Module and attribute, as one would import it."""
    return f"`{amed.NAMES[name].replace(':', '.')}`"
