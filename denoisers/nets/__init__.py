"""Architectures, under the parameter names of the published checkpoints."""
