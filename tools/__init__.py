"""Commands that are run as ``python -m tools.NAME``."""

import commands  # noqa: F401 (shows help, or what is missing, before the tool is imported)
