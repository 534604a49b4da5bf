"""Builders of samplers from options, one module per kind."""
