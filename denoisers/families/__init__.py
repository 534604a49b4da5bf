"""Families of models: how each is built, preconditioned and loaded."""
