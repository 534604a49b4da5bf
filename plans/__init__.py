"""Samplers as plans: walks down a time grid, jumps back up in noise."""
