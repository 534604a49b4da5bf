"""Commands that are run as ``python -m tools.NAME``."""

import commands  # noqa: F401 (shows a page of --help without importing the tool)
