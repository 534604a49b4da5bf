"""Samplers as plans: sequences of solves down a time grid and jumps back up in noise."""
