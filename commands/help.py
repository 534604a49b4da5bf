"""What all commands have in common, and their pages of --help as text.

Importing a command takes seconds, so help is read from ``help.txt``: ``python -m tools.docs_tables
help`` writes it, and a test compares it with the commands.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("help.txt")
#: Of every command: -h, defaults in the help, and options whose words are joined by - or by _.
SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "token_normalize_func": lambda token: token.replace("-", "_"),
}
WIDTH = 80  #: columns of the pages; click wraps them only on narrower terminals


def page(words: Sequence[str]) -> str | None:
    """The page that the words after ``python`` ask for, such as ``sample.py --help``."""
    if len(words) < 2 or words[-1] not in ("-h", "--help") or not PAGES.is_file():
        return None
    script = ["-m"] if words[0] == "-m" else [Path(words[0]).name]
    title = " ".join([*script, *words[1:-1]])
    _, found, rest = PAGES.read_text(encoding="utf-8").partition(f"\n## python {title}\n")
    return rest.partition("\n## ")[0].partition("\n<!--")[0] if found else None


def show_if_asked() -> None:
    """Print the page and exit, if help is all that this program was asked for."""
    text = page(sys.orig_argv[1:])
    if text is not None and shutil.get_terminal_size().columns >= WIDTH:
        print(text)
        sys.exit(0)
