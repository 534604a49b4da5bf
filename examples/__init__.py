"""Programs that use the toolkit, run as ``python -m examples.NAME``."""
