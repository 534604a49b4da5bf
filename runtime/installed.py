"""Whether this Python has what the commands need, asked before anything is imported."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def require_installed() -> None:
    """Exit with a sentence if the packages of the project are not installed for this Python."""
    missing = [name for name in ("torch", "numpy", "click") if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: {sys.executable} lacks {', '.join(missing)}: run ./launch.sh once, which "
            "makes .venv, and source .venv/bin/activate"
        )
