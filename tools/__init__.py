"""Commands that are run as ``python -m tools.NAME``."""

from runtime.installed import require_installed

require_installed()
