"""Errors that a person can cause and mend."""

from __future__ import annotations


class UserError(ValueError):
    """One clear sentence: the offending value and the remedy.

    Scripts print it as ``error: ...`` and exit with code 1, without a traceback.
    """
