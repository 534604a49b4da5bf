"""Commands that are run as ``python -m tools.NAME``."""
