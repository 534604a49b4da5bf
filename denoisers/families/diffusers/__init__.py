"""Pipelines of the ``diffusers`` library as denoisers."""
