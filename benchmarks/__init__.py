"""Measurements of speed, memory and sensitivity, run as ``python -m benchmarks.NAME``."""
