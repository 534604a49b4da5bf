"""Restart and every other sampler as a plan: walks down a time grid and jumps back up in noise."""
