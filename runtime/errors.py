"""Errors that the user can cause and fix."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can fix; its message is one sentence with the value and the remedy.

    Scripts print it as ``error: ...`` and exit with code 1, without a traceback.
    """


def reason(error: Exception) -> str:
    """The message of ``error`` on one line: the system's, without the path, if it has one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
