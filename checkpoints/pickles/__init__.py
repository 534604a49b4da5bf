"""Checkpoints that are pickles, read as data: nothing named in a file is imported or called."""
