"""Errors that the user can cause and fix."""

from __future__ import annotations

import re

LONGEST = 2000  #: letters in a sentence
_LONG_WORD = re.compile(r"(\S{300})\S{100,}")  # paths of more letters are rare


class UserError(ValueError):
    """An error that the user can fix; its message is one sentence with the value and the remedy.

    Scripts print it as ``error: ...`` and exit with code 1, without a traceback.  What it quotes
    from a file or a command line may be of any length: see `shortened`.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


def shortened(text: str) -> str:
    """``text`` with names of hundreds of letters, and the middle of a long text, left out."""
    text = _LONG_WORD.sub(r"\1...", text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    return text


def reason(error: Exception) -> str:
    """The message of ``error`` on one line: the system's, without the path, if it has one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shortened(" ".join(str(error).split())) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's error message; PyTorch's go on with its stack."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
